"""Clients that leave: work that nobody waits for is dropped, and who waits is answered."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest

from seqray.bundle import Bundle
from seqray.recommender import Query, Recommender, SimilarQuery
from serve.application import build_application
from serve.client import LONG_WAIT_S, Client, at_once
from serve.measures import REQUESTS
from serve.middleware import Message, ProblemMiddleware
from serve.served_model import ServedModel
from serve.service import Service
from tests.raw_http import HEAD, serving

JSON_BODY = (b"content-type", b"application/json")


class GatedRecommender(Recommender):
    """Answers when the gate is open, and remembers what it was asked."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.gate, self.asked = threading.Event(), list[int]()

    def recommend(self, queries: Sequence[Query | SimilarQuery]):
        """See Recommender."""
        assert self.gate.wait(30)
        self.asked += [query.k for query in queries]
        return super().recommend(queries)


@pytest.fixture
def recommender(tiny_bundle: Bundle) -> GatedRecommender:
    return GatedRecommender(tiny_bundle)


@pytest.fixture
def service(recommender: GatedRecommender, free_port: int) -> Iterator[Service]:
    """Behind uvicorn on `free_port`, as in a replica. The gate is shut."""
    service = Service("tiny", ServedModel(recommender, "tiny", "champion", 8), deadline_ms=20_000)
    recommender.gate.set()
    service.warm_up()
    recommender.gate.clear()
    recommender.asked.clear()
    with serving(ProblemMiddleware(build_application(service), in_replica=True), free_port):
        yield service
        recommender.gate.set()


def send(port: int, body: dict, path: str = "/v1/recommend") -> socket.socket:
    """A connection on which a request was sent."""
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: shop\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n"
    client.sendall(head.encode() + b"\r\n" + content)
    return client


def counted(service: Service) -> dict[tuple[str, ...], float]:
    return {labels: number for family, labels, number in service.measures.counters() if family == REQUESTS}


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_left_while_it_waited_is_not_ranked_and_who_stayed_is(
    service: Service, recommender: GatedRecommender, free_port: int
) -> None:
    first = send(free_port, {"k": 1})
    until(lambda: not service.champion.num_waiting)  # the model has it
    leaves, stays = send(free_port, {"k": 2}), send(free_port, {"k": 3})
    batch = send(free_port, {"requests": [{"k": 4}, {"k": 5}]}, "/v1/recommend:batch")
    until(lambda: service.champion.num_waiting == 4)
    leaves.close()
    batch.close()
    time.sleep(2 * LONG_WAIT_S)
    recommender.gate.set()
    for client in (first, stays):
        assert client.recv(12) == b"HTTP/1.1 200"
        client.close()
    assert recommender.asked == [1, 3]
    until(lambda: len(counted(service)) == 3)
    assert counted(service) == {("recommend", "200"): 2, ("recommend", "499"): 1, ("recommend:batch", "499"): 1}


def test_who_leaves_before_the_body_is_whole_is_counted_the_same_way(service: Service, free_port: int) -> None:
    client = socket.create_connection(("127.0.0.1", free_port), timeout=20)
    client.sendall(HEAD.replace(b"recommend", b"rank") + b"\r\n{")
    time.sleep(0.05)
    client.close()
    until(lambda: bool(counted(service)))
    assert counted(service) == {("rank", "499"): 1}


def test_a_message_is_taken_when_it_is_there_and_not_lost_when_it_comes_later() -> None:
    async def ask() -> list[Message | None]:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        client = Client(messages.get)
        found = [at_once(messages.get), client.has_left()]
        messages.put_nowait({"type": "http.request", "body": b"1"})
        found += [at_once(messages.get), at_once(messages.get)]
        messages.put_nowait({"type": "http.disconnect"})
        return [*found, client.has_left(), client.has_left()]

    assert asyncio.run(ask()) == [None, False, {"type": "http.request", "body": b"1"}, None, True, False]


@pytest.mark.parametrize(
    ("in_replica", "path", "unwatched"),
    [(True, "/v1/recommend", True), (True, "/v1/rank", True), (True, "/v1/events", False), (False, "/v1/rank", False)],
)
def test_ray_serve_watches_clients_where_nobody_else_does(in_replica: bool, path: str, unwatched: bool) -> None:
    seen: list[list[tuple[bytes, bytes]]] = []

    async def application(scope, _receive: Callable[[], Awaitable[Message]], _send: object) -> None:
        seen.append(scope["headers"])

    for given in ([], [(b"x-request-disconnect-disabled", b"?1")]):
        scope = {"type": "http", "path": path, "headers": [JSON_BODY, *given, (b"x-request-id", b"r1")]}
        asyncio.run(ProblemMiddleware(application, in_replica)(scope, None, None))  # type: ignore[arg-type]
    told = [(b"x-request-disconnect-disabled", b"?1")] if unwatched else []
    assert seen == [[JSON_BODY, (b"x-request-id", b"r1"), *told]] * 2
