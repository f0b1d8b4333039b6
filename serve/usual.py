"""The usual request of /v1/recommend, a flat object of a few plain fields, read without what the others need.

Whatever is not surely right here, and all that is wrong, is left to `serve.requests`, which says what is wrong.
"""

from typing import Any

import orjson

from seqray.query import Query
from serve.fields import MAX_NAME_LETTERS, are_text_ids
from serve.requests import MAX_DEADLINE_MS, MAX_HISTORY, MAX_K, Read, UsualRequest

USUAL_FIELDS = frozenset(("history", "k", "user_id", "session_id", "exclude_seen", "deadline_ms"))


def read_usual(body: bytes, as_json: bool = False) -> Read | None:
    """The request that a body says when it is a usual one, and right. as_json: see Query."""
    try:
        data = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    # Every field has a colon, so with one for each that was found none can be there twice.
    if type(data) is not dict or len(data) != body.count(b":") or not USUAL_FIELDS.issuperset(data):
        return None
    history: Any = data.get("history")
    k, exclude_seen = data.get("k", 20), data.get("exclude_seen")
    if not are_text_ids(history, MAX_HISTORY) or not _is_between(k, MAX_K):
        return None
    if exclude_seen is not None and type(exclude_seen) is not bool:
        return None
    deadline_ms = data.get("deadline_ms")
    if deadline_ms is not None and not _is_between(deadline_ms, MAX_DEADLINE_MS):
        return None
    user_id, session_id = data.get("user_id"), data.get("session_id")
    if not (_is_name(user_id) and _is_name(session_id)):
        return None
    query = Query(tuple(history), k, exclude_seen=exclude_seen, as_json=as_json)
    return Read(UsualRequest(query, user_id or session_id, deadline_ms), 0, [])


def _is_between(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_name(value: Any) -> bool:
    return value is None or (type(value) is str and 1 <= len(value) <= MAX_NAME_LETTERS)
