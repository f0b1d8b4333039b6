"""The HTTP API: the application by itself, then one real server behind Ray Serve."""

import asyncio
import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
from conftest import NUM_ITEMS, ROOT, save_tiny, tiny_items
from raw_http import HEAD, trickle
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.errors import BundleError
from seqray.recommender import Query, Recommender
from serve.answers import new_recommendation_id
from serve.application import build_application
from serve.batcher import Batcher
from serve.bodies import MAX_BODY_BYTES
from serve.haproxy_launcher import make_private
from serve.keys import KeyFile
from serve.middleware import ProblemMiddleware
from serve.replica import Replica
from serve.served_model import ServedModel
from serve.service import Service

JSON = {"Content-Type": "application/json"}


def serving(recommender: Recommender, name: str, max_batch_size: int) -> Service:
    return Service(name, ServedModel(recommender, name, "champion", max_batch_size))


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Bundle) -> Recommender:
    return Recommender(tiny_bundle)


@pytest.fixture(scope="module")
def client(recommender: Recommender) -> Iterator[TestClient]:
    service = serving(recommender, "tiny", 8)
    service.warm_up()
    # Outside Ray the middleware that Ray Serve puts around the application is put around it here.
    with TestClient(ProblemMiddleware(build_application(service))) as client:
        yield client


def problem(response) -> dict:
    """The body of an answer that must be a problem."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    return body


def pointers(response) -> list[str]:
    assert response.status_code == 400
    body = problem(response)
    assert body["code"] == "INVALID_ARGUMENT"
    return [error["pointer"] for error in body["errors"]]


def test_a_whole_request_is_a_history_and_k(client: TestClient, recommender: Recommender) -> None:
    response = client.post("/v1/recommend", json={"history": ["i1", "i2"], "k": 10})
    assert response.status_code == 200
    body = response.json()
    [expected] = recommender.recommend([Query(("i1", "i2"), 10)])
    assert [(item["item_id"], item["score"], item["source"]) for item in body["items"]] == [
        (item.item_id, pytest.approx(item.score), "model") for item in expected.items
    ]
    assert [item["rank"] for item in body["items"]] == list(range(1, 11))
    assert body["model"] == {"name": "tiny", "version": "tiny-1", "variant": "champion"}
    assert (body["unknown_items"], body["fallback_used"], body["warnings"]) == ([], False, [])
    assert sorted(body) == ["fallback_used", "items", "model", "recommendation_id", "unknown_items", "warnings"]
    assert response.headers["x-model-version"] == "tiny-1"


def test_every_field_is_taken(client: TestClient) -> None:
    request = {
        "user_id": "u42",
        "session_id": "s9",
        "history": [{"item_id": "i1", "event": "view", "timestamp": "2026-11-22T10:00:00Z"}, {"item_id": "zz"}],
        "k": 3,
        "exclude_items": ["i7"],
        "exclude_seen": False,
        "fallback": "none",
        "include": ["metadata"],
    }
    body = client.post("/v1/recommend", json=request).json()
    assert body["unknown_items"] == ["zz"]
    assert len(body["items"]) == 3
    for item in body["items"]:
        number = int(item["item_id"][1:])
        assert sorted(item) == ["item_id", "metadata", "rank", "source"]
        assert item["metadata"] == {"title": f"Título {number}", "price": float(number) if number % 2 else None}


def test_k_is_20_unless_told(client: TestClient) -> None:
    assert len(client.post("/v1/recommend", json={"history": ["i1"]}).json()["items"]) == 20
    assert len(client.post("/v1/recommend", json={"history": ["i1"], "k": 500}).json()["items"]) == NUM_ITEMS - 1


@pytest.mark.parametrize("request_body", [{}, {"history": []}, {"history": ["nope", "nope"]}, {"user_id": "new"}])
def test_an_unknown_user_gets_the_popular_items(client: TestClient, request_body: dict) -> None:
    body = client.post("/v1/recommend", json={"k": 3, **request_body}).json()
    assert [item["item_id"] for item in body["items"]] == ["i2", "i1", "i3"]
    assert {item["source"] for item in body["items"]} == {"popular"}
    assert body["fallback_used"]
    assert body["unknown_items"] == sorted(set(request_body.get("history", [])))


def test_a_long_history_keeps_the_newest_and_says_so(client: TestClient) -> None:
    history = ["i1"] * 500 + ["i2"] * 1000
    body = client.post("/v1/recommend", json={"history": history, "k": NUM_ITEMS}).json()
    assert body["warnings"] == ["history: of 1500 events the newest 1000 were taken"]
    assert "i1" in [item["item_id"] for item in body["items"]]


def test_timestamps_that_go_back_are_warned_of(client: TestClient) -> None:
    history = [{"item_id": "i1", "timestamp": 1700000000}, {"item_id": "i2", "timestamp": "2020-01-01"}]
    assert "timestamps go back" in client.post("/v1/recommend", json={"history": history}).json()["warnings"][0]
    assert client.post("/v1/recommend", json={"history": history[::-1]}).json()["warnings"] == []


def test_milliseconds_are_warned_of(client: TestClient) -> None:
    history = [{"item_id": "i1", "timestamp": 1700000000000}]
    assert "not milliseconds" in client.post("/v1/recommend", json={"history": history}).json()["warnings"][0]


@pytest.mark.parametrize("kind", [None, "view", "buy", "never heard of"])
def test_events_and_timestamps_are_ranked_as_offline(featured_bundle: Bundle, kind: str | None) -> None:
    recommender = Recommender(featured_bundle)
    service = serving(recommender, "featured", 4)
    service.warm_up()
    now = time.time()
    times = [now - 40 * 86_400, now - 9 * 86_400, now - 3 * 86_400]
    history = [{"item_id": f"i{n}", "event": kind, "timestamp": moment} for n, moment in enumerate(times, start=1)]
    with TestClient(build_application(service)) as client:
        for sent, query in [
            (history, Query(("i1", "i2", "i3"), 9, events=(kind,) * 3, timestamps=tuple(times))),
            ([*history[:2], "i3"], Query(("i1", "i2", "i3"), 9, events=(kind, kind, None))),
            (["i1", "i2", "i3"], Query(("i1", "i2", "i3"), 9)),
        ]:
            body = client.post("/v1/recommend", json={"history": sent, "k": 9}).json()
            [expected] = recommender.recommend([query])
            assert [(item["item_id"], item["score"]) for item in body["items"]] == [
                (item.item_id, pytest.approx(item.score, abs=1e-5)) for item in expected.items
            ]
            assert body["warnings"] == []


@pytest.mark.parametrize("moment", [9e14, -9e14, 1e-300, 253402300800])
def test_a_strange_time_is_no_failure(featured_bundle: Bundle, moment: float) -> None:
    service = serving(Recommender(featured_bundle), "featured", 4)
    service.warm_up()
    history = [{"item_id": "i1", "timestamp": moment}, {"item_id": "i2", "timestamp": -moment}]
    with TestClient(build_application(service)) as client:
        assert client.post("/v1/recommend", json={"history": history}).status_code == 200


@pytest.mark.parametrize(
    ("request_body", "expected"),
    [
        ([], [""]),
        ("i1", [""]),
        ({"histroy": ["i1"]}, ["/histroy"]),
        ({"k": 0}, ["/k"]),
        ({"k": 501}, ["/k"]),
        ({"k": "10"}, ["/k"]),
        ({"k": 10.0}, ["/k"]),
        ({"k": True}, ["/k"]),
        ({"k": None}, ["/k"]),
        ({"k": 10**400}, ["/k"]),
        ({"history": "i1"}, ["/history"]),
        ({"history": {"item_id": "i1"}}, ["/history"]),
        ({"history": ["i1", 1.5, None, True, [], ""]}, [f"/history/{index}" for index in range(1, 6)]),
        ({"history": ["x" * 513, 2**63]}, ["/history/0", "/history/1"]),
        ({"history": [{"item_id": "i1", "when": 3}]}, ["/history/0/when"]),
        ({"history": [{"event": "view"}]}, ["/history/0/item_id"]),
        ({"history": [{"item_id": {}}]}, ["/history/0/item_id"]),
        ({"history": [{"item_id": "i1", "timestamp": "yesterday"}]}, ["/history/0/timestamp"]),
        ({"history": [{"item_id": "i1", "timestamp": 10**400}]}, ["/history/0/timestamp"]),
        ({"history": ["\ud800"]}, ["/history/0"]),
        ({"exclude_items": "i1"}, ["/exclude_items"]),
        ({"exclude_items": ["i1"] * 1001}, ["/exclude_items"]),
        ({"exclude_items": [{"item_id": "i1"}]}, ["/exclude_items/0"]),
        ({"exclude_seen": "yes"}, ["/exclude_seen"]),
        ({"fallback": "random"}, ["/fallback"]),
        ({"include": ["score", "colour"]}, ["/include/1"]),
        ({"user_id": 7, "session_id": "\udfff"}, ["/user_id", "/session_id"]),
        ({"a/b~c": 1, "\ud800": 2}, ["/a~1b~0c", "/\ud800"]),
    ],
)
def test_a_mistake_is_named_by_its_pointer(client: TestClient, request_body: object, expected: list[str]) -> None:
    response = client.post("/v1/recommend", content=json.dumps(request_body), headers=JSON)
    assert pointers(response) == expected


def test_a_mistyped_field_is_told_the_nearest(client: TestClient) -> None:
    body = client.post("/v1/recommend", json={"histroy": []}).json()
    assert body["errors"] == [{"pointer": "/histroy", "detail": "unknown field; nearest: history"}]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b'{"k": NaN}',
        b'{"k": -Infinity}',
        b'{"k": 1, "k": 2}',
        b'{"history": [{"item_id": "a", "item_id": "b"}]}',
        b'{"history": ["\xff"]}',
        "{}".encode("utf-16"),
        b'\xef\xbb\xbf{"k": 1}',
        b"[" * 100_000,
        b'{"history": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":' * 50_000,
        b'{"k": ' + b"9" * 10_000 + b"}",
        b'{"history": ["a\x00b"]}',
    ],
)
def test_a_body_that_is_not_json_is_a_400(client: TestClient, body: bytes) -> None:
    assert pointers(client.post("/v1/recommend", content=body, headers=JSON)) in ([""], ["/history/0"])


@pytest.mark.parametrize("item_id", ["a\u0000b", "😀", "' OR 1=1 --", "../../etc/passwd", 0, -5, 2**62, "x" * 512])
def test_a_strange_id_is_only_unknown(client: TestClient, item_id: object) -> None:
    response = client.post("/v1/recommend", json={"history": [item_id, "i1"], "exclude_items": [item_id]})
    assert response.status_code == 200
    assert response.json()["unknown_items"] == [item_id]


@pytest.mark.parametrize(
    "media_type",
    [None, "text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", "application/jsonp"],
)
def test_other_media_types_are_a_415(client: TestClient, media_type: str | None) -> None:
    headers = {"Content-Type": media_type} if media_type else {}
    response = client.post("/v1/recommend", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert problem(response)["code"] == "INVALID_ARGUMENT"


def test_a_charset_of_utf_8_is_fine_and_compression_is_not(client: TestClient) -> None:
    headers = {"Content-Type": "application/json; charset=UTF-8"}
    assert client.post("/v1/recommend", content=b"{}", headers=headers).status_code == 200
    assert client.post("/v1/recommend", content=b"{}", headers={**JSON, "Content-Encoding": "gzip"}).status_code == 415


def test_a_large_body_is_a_413_announced_or_not(client: TestClient) -> None:
    fits = b'{"k": 1}'.ljust(MAX_BODY_BYTES)
    assert client.post("/v1/recommend", content=fits, headers=JSON).status_code == 200
    announced = client.post("/v1/recommend", content=fits + b" ", headers=JSON)
    streamed = client.post("/v1/recommend", content=(b" " * 2**16 for _ in range(17)), headers=JSON)
    for response in (announced, streamed):
        assert response.status_code == 413
        problem(response)
    huge = client.post("/v1/recommend", content=b"{}", headers={**JSON, "Content-Length": "9" * 5000})
    assert huge.status_code == 413


def test_other_paths_and_methods_are_problems(client: TestClient) -> None:
    assert problem(client.get("/v1/recommended"))["code"] == "NOT_FOUND"
    wrong_method = client.get("/v1/recommend")
    assert wrong_method.status_code == 405
    assert wrong_method.headers["allow"] == "POST"
    problem(wrong_method)


def test_the_request_id_is_echoed_when_it_is_fit(client: TestClient) -> None:
    given = client.post("/v1/recommend", json={}, headers={"X-Request-Id": "shop-17:a"})
    assert given.headers["x-request-id"] == "shop-17:a"
    made = {
        client.post("/v1/recommend", json={}, headers={"X-Request-Id": unfit}).headers["x-request-id"]
        for unfit in ("", "x" * 129, "a b", "<script>")
    }
    assert len(made) == 4
    assert all(len(request_id) == 32 for request_id in made)
    refused = client.post("/v1/recommend", json={"k": 0}, headers={"X-Request-Id": "r1"})
    assert problem(refused)["request_id"] == refused.headers["x-request-id"] == "r1"


def test_recommendation_ids_sort_by_time(client: TestClient) -> None:
    asked = client.post("/v1/recommend", json={}).json()["recommendation_id"]
    later = new_recommendation_id()
    assert len(asked) == len(later) == 30
    assert asked.startswith("rec_")
    assert asked[:14] <= later[:14]
    assert asked != later


def test_health(client: TestClient, recommender: Recommender) -> None:
    assert client.get("/healthz/live").json() == {"status": "live"}
    assert client.get("/healthz/ready").json()["model"]["version"] == "tiny-1"
    cold = TestClient(build_application(serving(recommender, "tiny", 8)))
    assert cold.get("/v2/health/live").status_code == 200
    for response in (cold.get("/v2/health/ready"), cold.post("/v1/recommend", json={})):
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert problem(response)["code"] == "UNAVAILABLE"


def test_openapi_knows_the_request(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    assert sorted(schemas["RecommendRequest"]["properties"]) == [
        "deadline_ms", "exclude_items", "exclude_seen", "explain", "fallback", "filter", "history", "include", "k",
        "session_id", "user_id",
    ]  # fmt: skip
    text = json.dumps(document)
    references = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert references <= set(schemas)
    assert client.get("/docs").status_code == 200


def test_metadata_of_any_type_is_json(tmp_path) -> None:
    items = tiny_items().select(["item_id", "train_events"])
    odd = [date(2026, 1, 2), Decimal("1.50"), b"raw", float("nan"), ["a", None]]
    for number, value in enumerate(odd):
        items = items.append_column(f"c{number}", pa.array([value] * NUM_ITEMS))
    service = serving(Recommender(save_tiny(tmp_path / "odd", items=items)), "odd", 2)
    service.warm_up()
    client = TestClient(build_application(service))
    body = client.post("/v1/recommend", json={"k": 1, "include": ["metadata"]}).json()
    assert body["items"][0]["metadata"] == {
        "c0": "2026-01-02",
        "c1": "1.50",
        "c2": "raw",
        "c3": None,
        "c4": ["a", None],
    }


def test_our_own_fault_is_a_problem_too() -> None:
    async def fails(scope, receive, send) -> None:
        await send({"type": "http.response.start", "status": 503, "headers": [(b"retry-after", b"7")]})
        await send({"type": "http.response.body", "body": b"Request dropped"})

    response = TestClient(ProblemMiddleware(fails)).get("/", headers={"X-Request-Id": "r1"})
    assert response.headers["retry-after"] == "7"
    assert response.headers.get_list("x-request-id") == [response.json()["request_id"]] == ["r1"]
    assert problem(response)["code"] == "UNAVAILABLE"


def test_a_replica_refuses_a_changed_bundle(tmp_path) -> None:
    bundle = save_tiny(tmp_path / "bundle")
    arguments = (str(bundle.folder), (), "tiny", {"max_batch_size": 4})
    assert Replica(*arguments).service.ready
    (bundle.folder / "metrics.json").write_text("{}")
    with pytest.raises(BundleError, match=r"metrics\.json does not match"):
        Replica(*arguments)


class Gated:
    """Runs batches, the first of which begins alone and ends when the others wait."""

    def __init__(self, run: Callable[[Sequence[int]], list[int]]) -> None:
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self._run = run

    def __call__(self, numbers: Sequence[int]) -> list[int]:
        self.batches.append(list(numbers))
        assert self.gate.wait(30)
        return self._run(numbers)

    async def ask(self, batcher: Batcher[int, int], count: int, cancelled: Sequence[int] = ()) -> list[Any]:
        tasks = [asyncio.ensure_future(batcher.submit(0))]
        while not self.batches:
            await asyncio.sleep(0.001)
        tasks += [asyncio.ensure_future(batcher.submit(number)) for number in range(1, count)]
        await asyncio.sleep(0)
        for number in cancelled:
            tasks[number].cancel()
        await asyncio.sleep(0)
        self.gate.set()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        batcher.close()
        return [type(answer).__name__ if isinstance(answer, BaseException) else answer for answer in answers]


def test_requests_that_wait_become_one_batch() -> None:
    run = Gated(lambda numbers: [number * 10 for number in numbers])
    assert asyncio.run(run.ask(Batcher(run, 4), 10)) == [number * 10 for number in range(10)]
    assert run.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]


def test_a_failure_stays_in_its_batch_and_who_left_is_not_ranked() -> None:
    def fail_at_1(numbers: Sequence[int]) -> list[int]:
        if 1 in numbers:
            raise ValueError("a bad batch")
        return list(numbers)

    run = Gated(fail_at_1)
    answers = asyncio.run(run.ask(Batcher(run, 2), 7, cancelled=[3]))
    assert answers == [0, "ValueError", "ValueError", "CancelledError", 4, 5, 6]
    assert run.batches == [[0], [1, 2], [4, 5], [6]]


def test_a_request_whose_time_is_over_is_not_ranked() -> None:
    seen: list[int] = []

    def run(numbers: Sequence[int]) -> list[int]:
        seen.extend(numbers)
        return list(numbers)

    async def ask() -> int:
        batcher: Batcher[int, int] = Batcher(run, 2)
        with pytest.raises(TimeoutError):
            await batcher.submit(1, seconds=-0.001)
        found = await batcher.submit(2, seconds=20)
        batcher.close()
        return found

    assert asyncio.run(ask()) == 2
    assert seen == [2]


def test_haproxy_keeps_its_own_pages_on_loopback() -> None:
    text = "frontend prometheus\n    bind :9101\nfrontend http_frontend\n    bind *:8000\nlisten stats\n  bind *:8404\n"
    private = make_private("global\n    nbthread 1\ndefaults\n    errorfile 503 /tmp/500.http\n" + text, "/x", "7")
    assert "bind 127.0.0.1:9101" in private
    assert "bind *:8000" in private
    assert "bind 127.0.0.1:8404" in private
    assert "errorfile 503 /x/503.http" in private
    assert "errorfile 408 /x/408.http" in private
    assert "timeout http-request 7s" in private
    assert "option dontlog-normal" in private
    assert private.startswith("global\n    tune.http.maxhdr 512\n")


# The real thing: `python -m serve` with a local cluster, HAProxy in front, asked over a socket.


def serve_command(folder: Path, port: int, bundle: Bundle, *settings: str) -> list[str]:
    config = folder / "tiny.yaml"
    config.write_text("name: tiny\ndata: {path: log.csv}\ncluster: {address: local}\n")
    return [
        sys.executable, "-m", "serve", str(config), f"serve.bundle={bundle.folder}", f"serve.port={port}", *settings,
    ]  # fmt: skip


class Server:
    """A running `python -m serve`."""

    def __init__(self, command: list[str], folder: Path, port: int, key: str = "") -> None:
        self.folder, self.port, self.key, self.lines = folder, port, key, []
        environment = {**os.environ, "RAY_TMPDIR": str(folder)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if "Ctrl-C" in line:
                return
        raise AssertionError(f"the server ended: {self.lines}")

    def ask(self, body: object, method: str = "POST", path: str = "/v1/recommend", headers: dict | None = None):
        """(status, headers, JSON) of one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        content = body if isinstance(body, bytes) else json.dumps(body)
        connection.request(method, path, content, {**JSON, "Authorization": f"Bearer {self.key}", **(headers or {})})
        response = connection.getresponse()
        text = response.read()
        connection.close()
        return response.status, response.headers, json.loads(text)

    def stop(self) -> int:
        """The exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        rest, _ = self.process.communicate(timeout=60)
        self.lines += rest.splitlines()
        return self.process.returncode


@pytest.fixture(scope="module")
def server(tiny_bundle: Bundle, module_port: int) -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: Ray's sockets are below it
    command = serve_command(
        folder, module_port, tiny_bundle, "serve.max_ongoing_requests=1", "serve.max_queued_requests=1",
        "serve.retry_after_s=3", "serve.max_replicas=1", "serve.keys.required=always",
        f"serve.keys.file={folder}/keys.json", "serve.keys.reload_s=0.2", "serve.body_timeout_s=1",
        "serve.log.sample=1",
    )  # fmt: skip
    server = Server(command, folder, module_port, KeyFile(f"{folder}/keys.json").add("shop"))
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_http_and_offline_give_the_same(server: Server, recommender: Recommender) -> None:
    for history in (["i1"], ["i5", "i9", "i5"], [f"i{index}" for index in range(1, 15)], ["nope"]):
        status, headers, body = server.ask({"history": history, "k": 12})
        [expected] = recommender.recommend([Query(tuple(history), 12)])
        assert status == 200
        assert headers["x-model-version"] == "tiny-1"
        assert [item["item_id"] for item in body["items"]] == [item.item_id for item in expected.items]
        scores = [item.score for item in expected.items]
        assert [item["score"] for item in body["items"]] == pytest.approx(scores, abs=1e-5)


def test_the_curl_example_works_as_printed(server: Server) -> None:
    [line] = [line for line in server.lines if "curl" in line]
    words = shlex.split(line.partition("curl")[2])
    assert words[1] == f"http://127.0.0.1:{server.port}/v1/recommend"
    assert "Authorization: Bearer $SEQRAY_KEY" in words
    status, _, body = server.ask(words[words.index("-d") + 1].encode())
    assert status == 200
    assert body["unknown_items"] == []
    assert body["items"][0]["metadata"]["title"].startswith("Título")


def test_the_server_is_ready_and_speaks_the_api(server: Server) -> None:
    assert server.ask(b"", "GET", "/healthz/ready")[2]["model"]["version"] == "tiny-1"
    status, headers, body = server.ask({"k": 0}, headers={"X-Request-Id": "r1"})
    assert (status, body["code"], body["request_id"]) == (400, "INVALID_ARGUMENT", "r1")
    assert headers.get_all("x-request-id") == ["r1"]
    assert server.ask(b"", "GET", "/nowhere")[2]["code"] == "NOT_FOUND"
    assert server.ask(b" " * (MAX_BODY_BYTES + 1))[0] == 413
    status, _, body = server.ask({}, headers={"X-Shop": b"\xff"})
    assert (status, body["detail"]) == (400, "A header is not UTF-8.")


def test_the_playground_is_served_on_loopback(server: Server) -> None:
    assert f"  try:   http://127.0.0.1:{server.port}/ in a browser" in server.lines
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/") as response:
        assert response.headers["Content-Security-Policy"].startswith("default-src 'self';")
        assert b"seqray playground" in response.read()
    assert server.ask(b"", "GET", "/v1/items?query=titulo")[2]["total"] == NUM_ITEMS


def test_haproxy_answers_and_nothing_of_serve_listens_beyond_loopback(server: Server) -> None:
    listening = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # one that Ray ended meanwhile
            name, connections = process.name(), process.net_connections("inet")
            open_ = [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]
            listening += [(name, place.ip, place.port) for place in open_]
    assert ("haproxy", "127.0.0.1", server.port) in listening
    assert {ip for name, ip, _ in listening if name == "haproxy"} == {"127.0.0.1"}
    assert not {9101, 8404, 8500} & {port for _, _, port in listening}


def test_too_many_requests_are_told_when_to_come_back(server: Server) -> None:
    answers: list[tuple] = []
    heavy = {"history": ["i1", "i2"] * 500, "k": 500, "include": ["metadata"]}

    def ask_until(deadline: float) -> None:
        while time.monotonic() < deadline and not any(status == 503 for status, _, _ in answers):
            answers.append(server.ask(heavy))

    threads = [threading.Thread(target=ask_until, args=[time.monotonic() + 20]) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {status for status, _, _ in answers} == {200, 503}
    _, headers, body = next(answer for answer in answers if answer[0] == 503)
    assert headers["retry-after"] == "3"
    assert headers["content-type"] == "application/problem+json"
    assert body["code"] == "UNAVAILABLE"


def test_a_key_is_asked_for_until_it_is_revoked(server: Server) -> None:
    file = KeyFile(str(server.folder / "keys.json"))
    guest = {"Authorization": f"Bearer {file.add('guest')}"}
    assert server.ask({}, headers={"Authorization": "Bearer x"})[0] == 401
    assert until(lambda: server.ask({}, headers=guest)[0] == 200)
    file.revoke("guest")
    assert until(lambda: server.ask({}, headers=guest)[0] == 401)
    assert server.ask({})[0] == 200
    assert server.ask(b"", "GET", "/metrics")[0] == 403


def test_too_many_headers_are_a_problem_behind_haproxy_too(server: Server) -> None:
    status, headers, _ = server.ask({}, headers={f"x-{number}": "1" for number in range(200)})
    assert (status, headers["content-type"]) == (431, "application/problem+json")


def test_a_request_that_trickles_in_is_ended(server: Server) -> None:
    for start in (HEAD, HEAD + b"\r\n{"):
        answer, seconds = trickle(server.port, start)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert seconds < 8


def ray_export(server: Server) -> str:
    [line] = [line for line in server.lines if "metrics:" in line]
    return urllib.request.urlopen(line.split()[1], timeout=30).read().decode()


def test_ray_serve_counts_what_it_refuses_and_no_request_that_went_well(server: Server) -> None:
    """After test_too_many_requests_are_told_when_to_come_back."""
    refused = r'ray_serve_num_http_error_requests_total{[^}]*error_code="503"[^}]*} [1-9]'
    assert until(lambda: bool(re.search(refused, ray_export(server))))
    statuses = re.findall(r'ray_serve_num_http_requests_total{[^}]*status_code="(\d+)"', ray_export(server))
    assert not [status for status in statuses if status.startswith("2")]


def test_ray_serve_makes_no_log_records_of_requests(server: Server) -> None:
    server.ask({})
    [log] = (server.folder / "ray" / "session_latest" / "logs" / "serve").glob("replica_tiny_*.log")
    assert " INFO " not in log.read_text()


def test_the_measures_are_in_the_export_of_ray(server: Server) -> None:
    wanted = {
        "ray_seqray_requests_total", "ray_seqray_stage_seconds_bucket_total", "ray_seqray_stage_seconds_sum_total",
        "ray_seqray_stage_seconds_count_total", "ray_seqray_batch_size_bucket_total", "ray_seqray_model",
        "ray_seqray_keys_refused_total", "ray_seqray_recommendations_total", "ray_seqray_waiting_requests",
    }  # fmt: skip
    assert until(lambda: wanted <= set(re.findall(r"^ray_seqray_\w+", ray_export(server), re.MULTILINE)))
    asked = r'ray_seqray_requests_total{[^}]*application="tiny"[^}]*endpoint="recommend"[^}]*} [1-9]'
    assert re.search(asked, ray_export(server))


def request_log(server: Server) -> list[dict]:
    logs = server.folder / "ray" / "session_latest" / "logs"
    texts = [line for path in logs.glob("worker-*.out") for line in path.read_text().splitlines()]
    return [json.loads(line) for line in texts if '"request_id"' in line]


def test_the_request_log_is_among_the_logs_of_ray(server: Server) -> None:
    server.ask({"user_id": "u-private"}, headers={"X-Request-Id": "find-me"})

    def lines() -> list[dict]:
        return [line for line in request_log(server) if line["request_id"] == "find-me"]

    assert until(lambda: len(lines()) == 1)
    assert (lines()[0]["status"], lines()[0]["key"], lines()[0]["model_version"]) == (200, "shop", "tiny-1")


def test_a_client_that_leaves_while_its_request_waits_is_logged(server: Server) -> None:
    body = json.dumps({"history": [f"i{index}" for index in range(1, 15)], "k": 100}).encode()
    head = f"POST /v1/explain HTTP/1.1\r\nHost: shop\r\nAuthorization: Bearer {server.key}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def some_left() -> bool:
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as stays:
            stays.sendall(request)
            with socket.create_connection(("127.0.0.1", server.port)) as leaves:
                leaves.sendall(request)
                time.sleep(0.002)
            assert stays.recv(12) == b"HTTP/1.1 200"
        return any((line["endpoint"], line["status"]) == ("explain", 499) for line in request_log(server))

    assert until(some_left)


def until(holds: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether `holds` comes true in time."""
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_a_taken_port_is_told_before_anything_starts(server: Server, tiny_bundle: Bundle, tmp_path: Path) -> None:
    command = serve_command(tmp_path, server.port, tiny_bundle)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: serve.port: cannot listen on 127.0.0.1 port {server.port}: ")
    assert done.stdout == ""


def test_it_stops_cleanly_when_told(server: Server) -> None:
    """The last test of the server."""
    assert server.stop() == 0
    assert server.lines[-1] == "stopping"
    assert not re.search(r"Traceback|Error|WARNING", "\n".join(server.lines))
