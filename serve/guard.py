"""Guard: who may ask what, and how often; from a key file that it looks at again and again."""

import hmac
import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping

from seqray.errors import ConfigError, DataError
from seqray.serve_config import ServeConfig
from serve.access import Access
from serve.keys import Key, KeyFile, Scope, are_required, digest
from serve.problems import Problem

MAX_SECRET_LETTERS = 256
CHALLENGE = 'Bearer realm="seqray"'
_log = logging.getLogger(__name__)


class Refusal(Problem):
    """A Problem 401, 403 or 429; `reason` is the word for it in the metrics, `key` the key that was shown."""

    def __init__(self, status: int, detail: str, reason: str, headers: Mapping[str, str], key: str | None) -> None:
        super().__init__(status, detail, headers=headers)
        self.reason, self.key = reason, key


class Guard:
    """Checks the key of each request against the keys that were read last.

    A key is found by the hash of what was sent, so that the time it takes tells nothing of the keys: who wants to learn
    a hash letter by letter would have to choose the letters of a sha256.
    """

    def __init__(
        self,
        file: KeyFile,
        rate_per_s: float | None = None,
        burst: int = 100,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = file
        self._rate, self._burst, self._clock = rate_per_s, float(burst), clock
        self._keys: dict[str, tuple[Key, float]] = {}
        self._buckets: dict[str, tuple[float, float]] = {}
        self._complained = False
        self._set(file.read())

    @classmethod
    def of(cls, serve: ServeConfig) -> "Guard | None":
        """One that watches the key file of these settings; None where they ask for no keys."""
        keys = serve.keys
        if not are_required(keys.required, serve.host):
            return None
        if keys.file is None:
            raise ConfigError("serve.keys.file: keys are asked for, but no file of them is named")
        guard = cls(KeyFile(keys.file), keys.rate_per_s, keys.burst)
        guard.watch(keys.reload_s)
        return guard

    def admit(self, headers: Iterable[tuple[bytes, bytes]], access: Access) -> str | None:
        """The name of the key in `headers`, None where none is asked for; or Refusal."""
        if access.scope is None:
            return None
        given = [value for name, value in headers if name == b"authorization"]
        if not given:
            detail = "This path asks for a key: Authorization: Bearer KEY."
            raise Refusal(401, detail, "no key", {"WWW-Authenticate": CHALLENGE}, None)
        key = self._find(given[0]) if len(given) == 1 else None
        if key is None:
            challenge = {"WWW-Authenticate": f'{CHALLENGE}, error="invalid_token"'}
            raise Refusal(401, "The key is unknown, revoked or expired.", "wrong key", challenge, None)
        if access.scope not in key.scopes:
            raise _out_of_scope(key, access.scope)
        if self._rate is not None:
            self._take(key.name, self._rate)
        return key.name

    def watch(self, seconds: float) -> None:
        """Looks at the file every so many seconds, in a thread that ends with the process."""
        threading.Thread(target=self._watch, args=[seconds], name="key-file", daemon=True).start()

    def look(self) -> None:
        """Takes over what the file says now; while it cannot be read, the keys of before go on."""
        try:
            self._set(self._file.read())
        except DataError as error:
            if not self._complained:  # once, not every few seconds
                _log.warning("the keys of before go on: %s", error)
            self._complained = True
        else:
            self._complained = False

    def _watch(self, seconds: float) -> None:
        while True:
            time.sleep(seconds)
            self.look()

    def _set(self, keys: Iterable[Key]) -> None:
        never = float("inf")
        self._keys = {key.sha256: (key, key.expires.timestamp() if key.expires else never) for key in keys}

    def _find(self, header: bytes) -> Key | None:
        scheme, _, secret = header.partition(b" ")
        if scheme.lower() != b"bearer" or len(secret) > MAX_SECRET_LETTERS:
            return None
        sha256 = digest(secret.strip())
        key, until = self._keys.get(sha256, (None, 0.0))
        if key is None or not hmac.compare_digest(key.sha256, sha256) or until <= time.time():
            return None
        return key

    def _take(self, name: str, rate: float) -> None:
        now = self._clock()
        left, then = self._buckets.get(name, (self._burst, now))
        left = min(self._burst, left + (now - then) * rate)
        if left < 1:
            self._buckets[name] = (left, now)
            wait = {"Retry-After": str(math.ceil((1 - left) / rate))}
            raise Refusal(429, f"This key may send {rate:g} requests a second to a replica.", "rate", wait, name)
        self._buckets[name] = (left - 1, now)


def _out_of_scope(key: Key, scope: Scope) -> Refusal:
    challenge = f'{CHALLENGE}, error="insufficient_scope", scope="{scope}"'
    detail = f"This path asks for a key with the scope {scope}."
    return Refusal(403, detail, "scope", {"WWW-Authenticate": challenge}, key.name)
