"""X-Request-Id: the client's when it is fit to be echoed and logged, else one of ours."""

import random
import re

chance = random.Random()
"""Seeded by the system once: to ask it for each id gives the interpreter's lock away, and it is slow to come back."""
_FIT = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


def fit_or_new(given: str) -> str:
    """`given` when it is 1 to 128 plain characters, else a new random id."""
    return given if _FIT.fullmatch(given) else f"{chance.getrandbits(128):032x}"
