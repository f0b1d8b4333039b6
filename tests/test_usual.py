"""The usual request is read the quick way, and never otherwise than the thorough way reads it."""

import json
import random
from typing import Any

import pytest

from serve.bodies import parse_json
from serve.problems import Problem
from serve.requests import RecommendRequest, read_context
from serve.usual import read_usual

RIGHT: dict[str, list[Any]] = {
    "history": [["a"], ["a", "b", "a"], ["x" * 512, "y"], ["a"] * 1000, ["n\0l"]],
    "k": [1, 20, 500], "user_id": ["u", "ü", "x" * 256, None], "session_id": ["s", None],
    "exclude_seen": [True, False, None], "deadline_ms": [1, 60_000, None],
}  # fmt: skip
DOUBTFUL: dict[str, list[Any]] = {
    "history": [[], ["x" * 513], ["a", 1], [1], ["a", ""], ["ä"], ["a:b"], None, "a", ["a"] * 1001, [["a"]],
                [{"item_id": "a"}], ["\ud800"], [None], [True], {}, [["a", {"b": 1}]]],
    "k": [0, 501, 1.0, True, None, "3", 10**30, -1, 2**64], "user_id": ["", "x" * 257, 7, "a:b"],
    "session_id": ["", ["s"]], "exclude_seen": [1, 0, "true"], "deadline_ms": [60_001, 0, 5.0, True],
    "exclude_items": [["a"]], "explain": [False, True], "fallback": ["none"], "unknown": [1],
}  # fmt: skip


def thorough(body: bytes) -> Any:
    """(query, who, deadline_ms, include, dropped, warnings), or None when it is refused."""
    try:
        read = read_context(RecommendRequest, parse_json(body))
    except Problem:
        return None
    return parts(read)


def parts(read: Any) -> Any:
    context = read.context
    query = context.asked(recommender=None)
    return query, context.who, context.deadline_ms, list(context.include), read.dropped, read.warnings


def bodies() -> list[bytes]:
    chance = random.Random(0)
    made = []
    for _ in range(3000):
        data = {name: chance.choice(values) for name, values in RIGHT.items() if chance.random() < 0.6}
        if chance.random() < 0.6:
            name = chance.choice(list(DOUBTFUL))
            data[name] = chance.choice(DOUBTFUL[name])
        separators = chance.choice([(",", ":"), (" , ", " : ")])
        text = json.dumps(data, ensure_ascii=chance.random() < 0.7, separators=separators)
        made.append(text.encode("utf-8", "surrogatepass"))
    return made


def test_the_quick_way_reads_what_the_thorough_way_reads_or_nothing() -> None:
    quick = 0
    for body in bodies():
        read = read_usual(body)
        if read is not None:
            quick += 1
            assert parts(read) == thorough(body), body
    assert quick > 300


@pytest.mark.parametrize(
    "body",
    [
        b'{"history": ["a", "b"], "k": 3}',
        b'{"history": ["a"]}',
        b'{"k":1,"history":["a"],"user_id":"u","session_id":"s","exclude_seen":false,"deadline_ms":50}',
    ],
)
def test_the_usual_requests_go_the_quick_way(body: bytes) -> None:
    read = read_usual(body)
    assert read is not None
    assert parts(read) == thorough(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"history": ["a"], "history": ["b"]}',
        b'{"history": ["a"], "k": 1, "k": 1}',
        b'{"history": ["a:b"], "k": 3}',
        b'{"history": ["a"], "k": NaN}',
        b'{"history": ["a"], "k": 1}x',
        b'{"history": ["\xff"]}',
        b'\xef\xbb\xbf{"history": ["a"]}',
        b'{"history": ["a"], "filter": {"field": "price", "lt": 3}}',
        b"[" * 100_000,
        b"",
        b"null",
        b'"history"',
    ],
)
def test_what_is_doubtful_goes_the_thorough_way(body: bytes) -> None:
    assert read_usual(body) is None
