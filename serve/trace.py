"""W3C Trace Context: the `traceparent` of a request is passed on with its answer."""

import re

from serve.request_id import chance

_FIT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-([0-9a-f]{2})(-.*)?")


def pass_on(given: bytes) -> tuple[str, bytes] | None:
    """(trace id, traceparent of our own span in this trace); None when `given` is none, which starts no trace."""
    found = _FIT.fullmatch(given) if len(given) <= 128 else None
    if found is None or (given.startswith(b"00") and found[3]):
        return None
    span = f"{chance.getrandbits(64) or 1:016x}".encode("ascii")
    return found[1].decode("ascii"), b"-".join((b"00", found[1], span, found[2]))
