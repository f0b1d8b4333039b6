"""Bad requests over a socket, to the application as a replica runs it: refused quickly, and the replica lives."""

import gc
import threading
from collections.abc import Iterator

import pytest
from raw_http import HEAD, serving, trickle

from benchmarks.bad_input import PATHS, TRIES, Answer, Case, ask, bodies, cases, is_ready, mistakes
from seqray.bundle import Bundle
from seqray.recommender import Recommender
from seqray.serve_config import ServeConfig
from serve.application import build_application
from serve.event_buffer import open_buffer
from serve.middleware import ProblemMiddleware
from serve.replica import spare_collections
from serve.served_model import ServedModel
from serve.service import Service

PATIENCE_MS = 2000
"""benchmarks/bad_input.py asks for 50; a busy machine is no mistake."""
CASES = [*cases("i1"), *(Case(name, body, path=path) for path in PATHS[1:] for name, body in bodies())]


@pytest.fixture(scope="module")
def port(tiny_bundle: Bundle, module_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 8))
    service.warm_up()
    thresholds = gc.get_threshold()
    events = {"folder": str(tmp_path_factory.mktemp("events"))}
    settings = ServeConfig(body_timeout_s=0.5, events=events)
    service.events = open_buffer(settings.events, settings.retry_after_s)
    application = build_application(service, settings=settings)
    spare_collections()
    with serving(ProblemMiddleware(application), module_port):
        yield module_port
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def answer(port: int, name: str) -> Answer:
    [case] = [case for case in cases("i1") if case.name == name]
    return ask("127.0.0.1", port, case.pieces())


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.path} {case.name}")
def test_bad_input_is_refused_quickly_and_the_replica_lives(case: Case, port: int) -> None:
    answers = [ask("127.0.0.1", port, case.pieces()) for _ in range(TRIES)]
    assert mistakes(case, answers, is_ready("127.0.0.1", port), PATIENCE_MS) == []


def test_a_filter_that_removes_all_leaves_an_empty_list_and_a_warning(port: int) -> None:
    body = answer(port, "filter that removes all").json()
    assert body["items"] == []
    assert body["warnings"] == ["filter: no item that may be returned meets it"]


def test_of_an_endless_history_the_newest_are_taken(port: int) -> None:
    body = answer(port, "a history of half a million numbers").json()
    assert body["warnings"] == ["history: of 500000 events the newest 1000 were taken"]
    assert body["fallback_used"]


def test_each_bad_request_of_a_batch_has_its_own_problem(port: int) -> None:
    results = answer(port, "a batch whose requests are bad").json()["results"]
    pointers = [result["problem"]["errors"][0]["pointer"] for result in results]
    assert pointers == ["/requests/0/k", "/requests/1"]


def test_others_are_answered_while_slow_bodies_trickle_in(port: int) -> None:
    valid = Case("", lambda: b'{"history": ["i1"], "k": 500}', (200,))
    ended: list[bytes] = []
    slow = [threading.Thread(target=lambda: ended.append(trickle(port, HEAD + b"\r\n{")[0])) for _ in range(20)]
    for thread in slow:
        thread.start()
    meanwhile = []
    while any(thread.is_alive() for thread in slow):
        meanwhile.append(ask("127.0.0.1", port, valid.pieces()))
    assert len(ended) == 20
    statuses = [answered.split(b" ")[1] for answered in ended if answered]  # a reset may have cost an answer
    assert set(statuses) == {b"408"}
    assert len(statuses) >= 10
    assert {answered.status for answered in meanwhile} == {200}
    assert sorted(answered.ms for answered in meanwhile)[len(meanwhile) // 2] < PATIENCE_MS
