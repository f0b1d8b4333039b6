"""What bad requests are answered, and how fast: a case a line, each to a server that must be alive after it.

    .venv/bin/python -m benchmarks.bad_input [--url http://127.0.0.1:8000] [--item-id A1]

Sends each case three times, over a socket of its own, and prints the status and the fastest answer in milliseconds,
from the first byte sent to the last byte received. Ends with 1 when a status is none of the expected ones, an error no
problem+json, an answer later than 50 ms, or the server not ready after a case. tests/test_bad_input.py runs the same
with more patience.
"""

import argparse
import gzip
import http.client
import json
import select
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

LIMIT_MS = 50
TRIES = 3
PIECE = 65_536
RECOMMEND = "/v1/recommend"
PATHS = (RECOMMEND, "/v1/recommend:batch", "/v1/similar-items", "/v1/rank", "/v1/explain", "/v1/events")


@dataclass(frozen=True)
class Answer:
    """What came back."""

    status: int
    media_type: str
    body: bytes
    ms: float

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Case:
    """A body that is wrong, and the statuses that are right."""

    name: str
    body: Callable[[], bytes]
    statuses: tuple[int, ...] = (400,)
    path: str = RECOMMEND
    headers: tuple[tuple[str, str], ...] = ()
    chunked: bool = False

    def pieces(self) -> Iterator[bytes]:
        """The request as it goes over the wire."""
        body = self.body()
        given = {"Content-Type": "application/json", **dict(self.headers)}
        length = {"Transfer-Encoding": "chunked"} if self.chunked else {"Content-Length": str(len(body))}
        head = {"Host": "shop", "Connection": "close", **length, **given}
        yield (
            f"POST {self.path} HTTP/1.1\r\n".encode()
            + b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in head.items())
            + b"\r\n"
        )
        for start in range(0, len(body), PIECE):
            piece = body[start : start + PIECE]
            yield b"%x\r\n%s\r\n" % (len(piece), piece) if self.chunked else piece
        if self.chunked:
            yield b"0\r\n\r\n"


def bodies() -> list[tuple[str, Callable[[], bytes]]]:
    """Bodies that no endpoint takes."""
    return [
        ("empty", lambda: b""),
        ("not JSON", lambda: b"history=A1"),
        ("half of a JSON object", lambda: b'{"history": ["A1"'),
        ("two JSON objects", lambda: b"{}{}"),
        ("not UTF-8", lambda: b'{"history": ["\xff"]}'),
        ("UTF-16", lambda: "{}".encode("utf-16")),
        ("a list", lambda: b"[]"),
        ("a string", lambda: b'"A1"'),
        ("null", lambda: b"null"),
        ("lists 10,000 deep", lambda: b"[" * 10_000 + b"]" * 10_000),
        ("objects 10,000 deep", lambda: b'{"history":' * 10_000 + b"1" + b"}" * 10_000),
        ("half a million open brackets", lambda: b"[" * 500_000),
        ("a field twice", lambda: b'{"k": 1, "k": 2}'),
        ("NaN", lambda: b'{"k": NaN}'),
        ("-Infinity", lambda: b'{"k": -Infinity}'),
        ("a NUL byte", lambda: b'{"history": ["A\x001"]}'),
        ("half of a surrogate pair", lambda: b'{"user_id": "\\ud800", "item_id": "\\udfff", "history": ["\\ud800"]}'),
        ("half of a surrogate pair as a field", lambda: b'{"\\ud800": 1}'),
        ("an unknown field", lambda: b'{"histroy": ["A1"]}'),
        ("50,000 unknown fields", lambda: json.dumps({f"f{n}": n for n in range(50_000)}).encode()),
        ("a number of 100,000 digits", lambda: b'{"k": ' + b"9" * 100_000 + b"}"),
    ]


def cases(item_id: str | int = "A1") -> list[Case]:
    """The list; `item_id`: an item that the server knows."""
    hundred_mb = gzip.compress(bytes(100 * 2**20))

    def body(**fields: Any) -> Callable[[], bytes]:
        return lambda: json.dumps({"history": [item_id], **fields}).encode()

    deep: dict[str, Any] = {"field": "item_id", "exists": True}
    for _ in range(40):
        deep = {"not": deep}
    none = {"all": [{"field": "item_id", "exists": True}, {"field": "item_id", "exists": False}]}
    many = {"any": [{"field": "item_id", "eq": item_id}] * 1000}
    gzipped = (("Content-Encoding", "gzip"),)
    return [
        *(Case(name, make) for name, make in bodies()),
        Case("10 MB", lambda: b" " * 10_000_000, (413,)),
        Case("10 MB in chunks", lambda: b" " * 10_000_000, (413,), chunked=True),
        Case("gzip of 100 MB", lambda: hundred_mb, (415,), headers=gzipped),
        Case("gzip without a word of it", lambda: hundred_mb),
        Case("another media type", lambda: b"{}", (415,), headers=(("Content-Type", "text/xml"),)),
        Case("a header that is not UTF-8", lambda: b"{}", headers=(("X-Shop", "\xff"),)),
        Case("200 headers", lambda: b"{}", (431,), headers=tuple((f"X-{n}", "1") for n in range(200))),
        Case("negative k", body(k=-1)),
        Case("k of 2^63", body(k=2**63)),
        Case("k of 1e999", lambda: b'{"k": 1e999}'),
        Case("k as text", body(k="10")),
        Case("timestamp of 1e999", lambda: b'{"history": [{"item_id": "A1", "timestamp": 1e999}]}'),
        Case("a history of a million ids", lambda: json.dumps({"history": ["A1"] * 10**6}).encode(), (413,)),
        Case("a history of half a million numbers", lambda: b'{"history": [' + b"1," * 499_999 + b"1]}", (200,)),
        Case("200,000 lists as ids", lambda: b'{"exclude_items": [' + b"[]," * 199_999 + b"[]]}"),
        Case("an item id of a million letters", body(exclude_items=["x" * 10**6])),
        Case("a NUL in an item id, which is only unknown", body(exclude_items=["A\0"]), (200,)),
        Case("filter that removes all", body(filter=none), (200,)),
        Case("filter on no such field", body(filter={"field": "\0", "eq": 1})),
        Case("filter that is none", body(filter=[])),
        Case("filter 40 deep", body(filter=deep)),
        Case("filter of 1,000 conditions", body(filter=many)),
        Case("65 requests in a batch", lambda: json.dumps({"requests": [{}] * 65}).encode(), path=PATHS[1]),
        Case("a batch whose requests are bad", lambda: b'{"requests": [{"k": 0}, 7]}', (200,), PATHS[1]),
        Case("1,001 candidates", body(candidates=[item_id] * 1001), path="/v1/rank"),
        Case("items and k to explain", body(items=[item_id], k=3), path="/v1/explain"),
        Case("a path upwards", lambda: b"{}", (404,), "/v1/../../etc/passwd"),
        Case("a path that is none", lambda: b"{}", (404,), "/v1/%00%2e%2e"),
        Case("a method that is none", lambda: b"{}", (405,), "/v1/items"),
    ]


def ask(host: str, port: int, pieces: Iterator[bytes]) -> Answer:
    """Sends until the server answers; ConnectionError or TimeoutError when it does not."""
    prepared = list(pieces)
    with socket.create_connection((host, port), timeout=30) as client:
        client.setsockopt(
            socket.IPPROTO_TCP, socket.TCP_NODELAY, 1
        )  # as HTTP clients do, which send head and body apart
        began = time.perf_counter()
        for piece in prepared:
            if select.select([client], [], [], 0)[0]:
                break  # it has heard enough
            try:
                client.sendall(piece)
            except ConnectionError:
                break
        response = http.client.HTTPResponse(client)
        response.begin()
        body = response.read()
        ms = (time.perf_counter() - began) * 1000
        return Answer(response.status, response.headers.get("Content-Type", ""), body, ms)


def is_ready(host: str, port: int) -> bool:
    """Whether the server would take a request now."""
    connection = http.client.HTTPConnection(host, port, timeout=30)
    try:
        connection.request("GET", "/healthz/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def mistakes(case: Case, answers: Sequence[Answer], ready: bool, limit_ms: float = LIMIT_MS) -> list[str]:
    """What is wrong with the answers to a case."""
    found = []
    for answer in answers:
        if answer.status not in case.statuses:
            found.append(f"status {answer.status}, not {case.statuses}")
        elif answer.status >= 400 and answer.media_type != "application/problem+json":
            found.append(f"{answer.media_type or 'nothing'} instead of a problem")
    if min(answer.ms for answer in answers) > limit_ms:
        found.append(f"later than {limit_ms:g} ms")
    if not ready:
        found.append("not ready after it")
    return list(dict.fromkeys(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--item-id", default="A1", help="an item that the server knows")
    arguments = parser.parse_args()
    place = urlsplit(arguments.url)
    host, port = place.hostname or "127.0.0.1", place.port or 80
    failed = 0
    print(f"{'case':<48} {'status':>6} {'ms':>7}")
    for case in cases(arguments.item_id):
        answers = [ask(host, port, case.pieces()) for _ in range(TRIES)]
        wrong = mistakes(case, answers, is_ready(host, port))
        failed += bool(wrong)
        fastest = min(answer.ms for answer in answers)
        print(f"{case.name:<48} {answers[0].status:>6} {fastest:>7.1f}  {'; '.join(wrong)}".rstrip())
    print(f"{failed} of {len(cases())} cases were not answered as they should be")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
