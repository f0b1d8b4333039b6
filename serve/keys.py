"""API keys: random, shown once, kept as sha256 in one JSON file, local or in an object store, that replicas watch.

A key is 256 random bits, so nobody finds it from its hash by trying: slow hashes (argon2, scrypt) are for passwords
that people choose. One would cost milliseconds in every request, and whoever sends wrong keys could overload us.
"""

import fcntl
import hashlib
import json
import re
import secrets
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from seqray.config import Config
from seqray.errors import ConfigError, DataError
from seqray.folder import Folder
from seqray.locations import join, split
from seqray.serve_config import KeysConfig, is_loopback

Scope = Literal["recommend", "events", "metrics"]
SCOPES: tuple[Scope, ...] = ("recommend", "events", "metrics")
DEFAULT_SCOPES: tuple[Scope, ...] = ("recommend", "events")
PREFIX = "seqray_"
"""What a key begins with, so that scanners for leaked secrets can know one."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class _Plain(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Key(_Plain):
    """What is kept of a key."""

    name: Annotated[str, Field(pattern=f"^{NAME.pattern}$")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = Field(min_length=1)
    created: AwareDatetime
    expires: AwareDatetime | None = None

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= now


class _Keys(_Plain):
    format: Literal[1] = 1
    keys: tuple[Key, ...] = ()


class KeyFile:
    """The keys at a location; what cannot be read or written is a DataError, a name that does not fit a ConfigError."""

    def __init__(self, location: str) -> None:
        folder, name = split(location)
        if not name:
            raise ConfigError(f"{location}: is a folder; a key file is such as {join(location, 'keys.json')}")
        self._folder, self._name = Folder.at(folder), name
        self.location = join(self._folder.location, name)
        """The absolute path, or the URI."""

    @classmethod
    def of(cls, config: Config) -> "KeyFile":
        """The file of `serve.keys.file`, or `keys/NAME.json` in `output`."""
        return cls(config.serve.keys.file or join(config.output, f"keys/{config.name}.json"))

    def read(self) -> tuple[Key, ...]:
        """The keys, oldest first; none when there is no file."""
        text = self._folder.read_text(self._name)
        if text is None:
            return ()
        try:
            return _Keys.model_validate_json(text).keys
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]  # the input could be a key by mistake
            place = ".".join(str(part) for part in first["loc"])
            raise DataError(f"{self.location}: not a key file: {place}: {first['msg']}") from None

    def add(self, name: str, scopes: Sequence[Scope] = DEFAULT_SCOPES, days: float | None = None) -> str:
        """A new key, which is told this once; it expires after `days`."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"name {name!r}: letters, digits, dot, dash and underscore, at most 64")
        secret = PREFIX + secrets.token_urlsafe(32)
        now = datetime.now(UTC).replace(microsecond=0)
        expires = None if days is None else now + timedelta(days=days)
        key = Key(name=name, sha256=digest(secret.encode("ascii")), scopes=tuple(scopes), created=now, expires=expires)

        def with_key(keys: tuple[Key, ...]) -> tuple[Key, ...]:
            if any(old.name == name for old in keys):
                raise ConfigError(f"{self.location}: there is a key {name!r}; revoke it first, or choose another name")
            return (*keys, key)

        self._change(with_key)
        return secret

    def revoke(self, name: str) -> None:
        """Takes a key away; running replicas refuse it after `serve.keys.reload_s` at the latest."""

        def without_key(keys: tuple[Key, ...]) -> tuple[Key, ...]:
            left = tuple(key for key in keys if key.name != name)
            if len(left) == len(keys):
                names = ", ".join(key.name for key in keys) or "none"
                raise ConfigError(f"{self.location}: there is no key {name!r}; keys: {names}")
            return left

        self._change(without_key)

    def _change(self, change: Callable[[tuple[Key, ...]], tuple[Key, ...]]) -> None:
        with self._locked() if self._folder.is_local else nullcontext():
            keys = change(self.read())
            data = _Keys(keys=keys).model_dump(mode="json")
            self._folder.write_text(self._name, json.dumps(data, indent=1) + "\n")
            if self.read() != keys:  # an object store has no lock: two may have written at the same time
                raise DataError(f"{self.location}: was written by another at the same time; look at it and try again")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self._folder.path / f".{self._name}.lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
                yield
        except OSError as error:
            raise DataError(f"{path}: cannot be locked: {error}") from error


def digest(secret: bytes) -> str:
    """What is kept of a key."""
    return hashlib.sha256(secret).hexdigest()


def are_required(required: Literal["auto", "always", "never"], host: str) -> bool:
    """Whether an endpoint that listens on `host` asks for keys; see `serve.keys.required`."""
    return required == "always" or (required == "auto" and not is_loopback(host))


def resolved(config: Config, host: str) -> KeysConfig:
    """`serve.keys` for replicas that answer on `host`: `always` or `never`, and the file by its absolute location.

    ConfigError when keys are asked for but there is none that is good now.
    """
    keys, file = config.serve.keys, KeyFile.of(config)
    required = are_required(keys.required, host)
    now = datetime.now(UTC)
    if required and all(key.is_expired(now) for key in file.read()):
        raise ConfigError(
            f"serve.host: {host}, serve.keys.required: {keys.required}, and no good key in {file.location}: make one\n"
            f"  python -m serve keys add NAME --file {shlex.quote(file.location)}\n"
            "or let everybody in, behind a gateway that asks for keys itself, with serve.keys.required=never"
        )
    return keys.model_copy(update={"required": "always" if required else "never", "file": file.location})
