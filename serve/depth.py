"""How deep JSON is nested, found without parsing it: a parser goes one call deeper with each bracket."""

import numpy as np

MAX_DEPTH = 100
_ONLY_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_ALIKE = bytes.maketrans(b"{}", b"[]")
_BETWEEN = (ord("[") + ord("]")) // 2


def is_deeper(body: bytes, limit: int = MAX_DEPTH) -> bool:
    """Whether brackets outside of strings are nested more than `limit` deep; of what is no JSON it may say either."""
    if body.count(b"[") + body.count(b"{") <= limit:
        return False
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    outside = b"".join(plain.split(b'"')[::2])
    brackets = np.frombuffer(outside.translate(_ALIKE, _ONLY_BRACKETS), np.uint8)
    depths = np.cumsum(_BETWEEN - brackets.astype(np.int8), dtype=np.int32)
    return bool(depths.max(initial=0) > limit)
