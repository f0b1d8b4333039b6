"""Canary: which users the challenger answers, by a hash alone, so that all replicas agree and remember nothing."""

import hashlib


def is_in_share(user: str, salt: str, share: float) -> bool:
    """Whether a user belongs to the share (0 to 1) that `salt` draws; who does stays in when the share grows."""
    if not 0 < share < 1:
        return share >= 1
    digest = hashlib.blake2b(user.encode("utf-8", errors="surrogatepass"), digest_size=8, key=_key(salt)).digest()
    return int.from_bytes(digest) < share * 2**64


def _key(salt: str) -> bytes:
    return hashlib.sha256(salt.encode("utf-8")).digest()
