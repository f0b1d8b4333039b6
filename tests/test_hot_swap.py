"""A new model under a running replica: swapped under load, refused, shared out by canary, shadowed."""

import asyncio
import gc
import http.client
import json
import logging
import shutil
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import uvicorn
from registry_bundles import ADMISSION, LOADER, offline, registry_of, save_other
from starlette.testclient import TestClient
from test_registry import BROKEN, spoil

from seqray.errors import BundleError
from seqray.recommender import Query, RankedItem, Recommendation
from serve.admission import Admission
from serve.application import build_application
from serve.canary import is_in_share
from serve.follower import Follower, ModelLoader
from serve.promote import promote, rollback, withdraw
from serve.registry import Registry
from serve.service import Service
from serve.shadow import Shadow, compare

HISTORIES = [("i1", "i2"), ("i5",), ("i9", "i9", "i3", "i4")]


class Following:
    """A service that follows a registry when it is told to look."""

    def __init__(
        self, registry: Registry, share: float = 0.0, shadow: Shadow | None = None, loader: ModelLoader = LOADER
    ) -> None:
        self.registry = registry
        self._follower = Follower(registry, loader, 0.01, share)
        models = self._follower.first_models()
        self.service = Service("tiny", models.champion, shadow=shadow)
        self.service.put(models)
        self.client = TestClient(build_application(self.service))
        self.look()

    def look(self) -> None:
        self._follower.look(self.service)

    def start(self) -> None:
        self._follower.start(self.service)

    def close(self) -> None:
        self._follower.close()

    def ask(self, **more: object) -> dict:
        response = self.client.post("/v1/recommend", json={"history": ["i1", "i2"], "k": 5, **more})
        assert response.status_code == 200
        body = response.json()
        assert response.headers["x-model-version"] == body["model"]["version"]
        return body

    def versions(self) -> tuple[str | None, str | None]:
        """Those of champion and challenger, as they answer."""
        models = self.service.models
        return models.champion.version, models.challenger and models.challenger.version


def add_challenger(folder: Path, registry: Registry, number: int) -> None:
    promote(registry, ADMISSION, str(save_other(folder / f"bundle-{number}", number).folder), challenger=True)


def ranked(body: dict) -> list[tuple[str, float]]:
    return [(item["item_id"], item["score"]) for item in body["items"]]


def close_to(items: list[tuple[str, float]]) -> list[tuple[str, object]]:
    return [(item_id, pytest.approx(score, abs=1e-4)) for item_id, score in items]


def test_a_replica_goes_over_to_the_champion_and_back(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    following = Following(registry)
    assert following.ask()["model"] == {"name": "tiny", "version": "1", "variant": "champion"}
    promote(registry, ADMISSION, str(save_other(tmp_path / "bundle-2", 2).folder))
    assert following.ask()["model"]["version"] == "1"
    following.look()
    body = following.ask()
    assert body["model"] == {"name": "tiny", "version": "2", "variant": "champion"}
    assert ranked(body) == close_to(offline(tmp_path / "bundle-2", ("i1", "i2")))
    rollback(registry, ADMISSION)
    following.look()
    assert ranked(following.ask()) == close_to(offline(tmp_path / "bundle-1", ("i1", "i2")))


def test_the_old_weights_are_freed_after_the_last_answer(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    following = Following(registry)
    following.ask()
    held = following.service.models.for_user("u1")  # as a request that is not answered yet
    weights = weakref.ref(held.recommender)
    before = threading.active_count()
    promote(registry, ADMISSION, str(save_other(tmp_path / "bundle-2", 2).folder))
    following.look()
    following.ask()
    gc.collect()
    assert weights() is not None
    del held
    gc.collect()
    assert weights() is None
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before  # the old batcher's thread is gone too


@pytest.mark.parametrize("how", BROKEN)
def test_a_version_that_breaks_after_it_was_registered_leaves_the_old_one(tmp_path: Path, how: str) -> None:
    registry = registry_of(tmp_path, 1)
    following = Following(registry)
    version, _ = promote(registry, ADMISSION, str(save_other(tmp_path / "bundle-2", 2).folder))
    broken = spoil(tmp_path / "bundle-2", how)
    shutil.rmtree(registry.bundle(version))
    shutil.copytree(broken, registry.bundle(version))
    following.look()
    following.look()
    assert ranked(following.ask()) == close_to(offline(tmp_path / "bundle-1", ("i1", "i2")))
    told = following.client.get("/v1/models").json()
    assert told["aliases"] == {"champion": "1", "challenger": None}
    assert told["registry"]["aliases"]["champion"] == "2"
    [failed] = told["registry"]["failed"]
    assert failed["version"] == "2"
    assert failed["reason"]
    assert str(tmp_path) not in json.dumps(told)
    ready = following.client.get("/healthz/ready")
    assert ready.status_code == 200
    assert (ready.json()["model"]["version"], ready.json()["failed"]) == ("1", ["2"])
    rollback(registry, ADMISSION)
    following.look()
    assert following.client.get("/v1/models").json()["registry"]["failed"] == []


def test_an_oversized_version_never_answers(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    following = Following(registry, loader=replace(LOADER, admission=Admission(max_items=30)))
    large = save_other(tmp_path / "bundle-2", 2)
    promote(registry, ADMISSION, str(large.folder))
    following._follower._loader = replace(LOADER, admission=Admission(max_bundle_mb=0.001))
    following.look()
    assert following.ask()["model"]["version"] == "1"
    assert "max_bundle_mb" in following.client.get("/v1/models").json()["registry"]["failed"][0]["reason"]


def test_a_new_replica_takes_the_last_champion_that_is_not_broken(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2, 3)
    for number in (2, 3):
        (Path(registry.bundle(registry.version(number))) / "metrics.json").unlink()
    following = Following(registry)
    assert following.versions() == ("1", None)
    failed = following.client.get("/v1/models").json()["registry"]["failed"]
    assert [one["version"] for one in failed] == ["2", "3"]
    (Path(registry.bundle(registry.version(1))) / "metrics.json").unlink()
    with pytest.raises(BundleError, match="no champion that can answer: version 3: metrics"):
        Following(registry)
    with pytest.raises(BundleError, match="no champion; python -m serve promote"):
        Following(Registry.at(tmp_path / "empty"))


def test_what_may_pass_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.follower.FIRST_RETRY_S", 0.0)
    registry = registry_of(tmp_path, 1)
    following = Following(registry)
    promote(registry, ADMISSION, str(save_other(tmp_path / "bundle-2", 2).folder))
    record = tmp_path / "registry" / "versions" / "000002.json"
    text = record.read_text()
    record.write_text("not yet")
    following.look()
    assert following.versions() == ("1", None)
    record.write_text(text)
    following.look()
    assert following.versions() == ("2", None)
    assert following.client.get("/v1/models").json()["registry"]["failed"] == []


def test_a_registry_that_cannot_be_read_leaves_the_models(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    following = Following(registry)
    bad = tmp_path / "registry" / "changes" / "000002.json"
    bad.write_text("torn")
    following.look()
    assert following.ask()["model"]["version"] == "1"
    assert not following.client.get("/v1/models").json()["registry"]["readable"]
    bad.unlink()
    following.look()
    assert following.client.get("/v1/models").json()["registry"]["readable"]


def test_models_tells_what_answers(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    add_challenger(tmp_path, registry, 2)
    told = Following(registry, share=0.25).client.get("/v1/models").json()
    assert [(m["version"], m["variant"], m["state"], m["run_id"]) for m in told["models"]] == [
        ("1", "champion", "ready", "run-1"),
        ("2", "challenger", "ready", "run-2"),
    ]
    assert told["models"][0]["metrics"] == {"test/ndcg@10": 0.25}
    assert told["aliases"] == told["registry"]["aliases"] == {"champion": "1", "challenger": "2"}
    assert (told["canary_share"], told["shadow"], told["registry"]["change"]) == (0.25, None, 2)


# Under load


@contextmanager
def served(following: Following) -> Iterator[int]:
    """The application behind uvicorn in a thread; its port."""
    config = uvicorn.Config(build_application(following.service), port=0, log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def ask_on(port: int, ended: threading.Event, answers: list[tuple[int, dict]]) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not ended.is_set():
        history = HISTORIES[len(answers) % len(HISTORIES)]
        body = json.dumps({"history": history, "k": 5, "include": ["score", "metadata"]})
        connection.request("POST", "/v1/recommend", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answers.append((response.status, {**json.loads(response.read()), "history": history}))
    connection.close()


def test_a_swap_under_load_loses_no_request_and_mixes_no_models(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2)
    following = Following(registry)
    following.start()
    expected = {
        (number, history): close_to(offline(tmp_path / f"bundle-{number}", history))
        for number in (1, 2)
        for history in HISTORIES
    }
    answers: list[list[tuple[int, dict]]] = [[] for _ in range(4)]
    ended = threading.Event()
    with served(following) as port:
        clients = [threading.Thread(target=ask_on, args=(port, ended, mine)) for mine in answers]
        for client in clients:
            client.start()
        for number in (1, 2, 1, 2):
            promote(registry, ADMISSION, number)
            deadline = time.monotonic() + 30
            while following.versions()[0] != str(number) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.1)
        ended.set()
        for client in clients:
            client.join()
    following.close()
    seen = Counter()
    for status, body in (answer for mine in answers for answer in mine):
        assert status == 200
        number = int(body["model"]["version"])
        seen[number] += 1
        assert ranked(body) == expected[number, body["history"]]
    assert min(seen[1], seen[2]) > 10
    switches = [
        sum(a["model"]["version"] != b["model"]["version"] for (_, a), (_, b) in pairwise(mine)) for mine in answers
    ]
    assert switches == [4] * 4  # each client sees each swap once, and never a version that had gone


# Canary


def test_the_canary_gets_its_share_and_keeps_it() -> None:
    users = [f"user-{number}" for number in range(20_000)]
    small = {user for user in users if is_in_share(user, "tiny/2", 0.1)}
    assert len(small) == pytest.approx(2000, abs=200)
    assert small == {user for user in users if is_in_share(user, "tiny/2", 0.1)}
    assert small < {user for user in users if is_in_share(user, "tiny/2", 0.3)}
    other = {user for user in users if is_in_share(user, "tiny/3", 0.1)}
    assert len(small & other) == pytest.approx(200, abs=80)  # another challenger meets other users
    assert not any(is_in_share(user, "tiny/2", 0.0) for user in users)
    assert all(is_in_share(user, "tiny/2", 1.0) for user in users)


def test_a_user_stays_with_one_variant(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    add_challenger(tmp_path, registry, 2)
    following = Following(registry, share=0.5)
    expected = {n: close_to(offline(tmp_path / f"bundle-{n}", ("i1", "i2"))) for n in (1, 2)}
    variants = {}
    for user in range(40):
        bodies = [following.ask(user_id=f"u{user}", session_id=session) for session in ("a", "b")]
        bodies.append(following.ask(session_id=f"u{user}"))
        [variants[user]] = {body["model"]["variant"] for body in bodies}
        for body in bodies:
            assert ranked(body) == expected[int(body["model"]["version"])]
    assert 8 < list(variants.values()).count("challenger") < 32
    assert {following.ask()["model"]["variant"] for _ in range(20)} == {"champion"}  # nobody to remember
    withdraw(registry)
    following.look()
    assert {following.ask(user_id=f"u{user}")["model"]["version"] for user in range(40)} == {"1"}


def test_a_challenger_that_is_promoted_is_not_loaded_again(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    add_challenger(tmp_path, registry, 2)
    following = Following(registry, share=1.0)
    model = following.service.models.for_user("u")
    promote(registry, ADMISSION, 2)
    following.look()
    assert following.versions() == ("2", None)
    assert following.service.models.champion.recommender is model.recommender
    assert following.ask(user_id="u")["model"]["variant"] == "champion"


def test_a_broken_challenger_leaves_all_users_to_the_champion(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    add_challenger(tmp_path, registry, 2)
    (Path(registry.bundle(registry.version(2))) / "metrics.json").unlink()
    following = Following(registry, share=1.0)
    assert following.ask(user_id="u")["model"] == {"name": "tiny", "version": "1", "variant": "champion"}


# Shadow


def answer_of(*items: tuple[str, float]) -> Recommendation:
    return Recommendation(tuple(RankedItem(item_id, score, "model") for item_id, score in items))


def test_two_answers_are_compared() -> None:
    one = answer_of(("a", 3.0), ("b", 2.0), ("c", 1.0), ("d", 0.0))
    other = answer_of(("b", 1.0), ("a", 3.5), ("x", 1.0), ("y", 0.0))
    assert compare(one, other).overlap == 0.5
    assert compare(one, other).score_difference == pytest.approx(0.75)
    assert compare(one, answer_of()).overlap == 0.0
    assert compare(answer_of(), answer_of()).overlap == 1.0
    assert compare(answer_of(), answer_of()).score_difference is None


def test_the_shadow_is_asked_and_never_returned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = registry_of(tmp_path, 1)
    add_challenger(tmp_path, registry, 2)
    shadow = Shadow()
    following = Following(registry, shadow=shadow)
    expected = close_to(offline(tmp_path / "bundle-1", ("i1", "i2")))
    with caplog.at_level(logging.INFO, "seqray.models"), following.client as client:
        for user in range(20):
            body = client.post("/v1/recommend", json={"history": ["i1", "i2"], "k": 5, "user_id": f"u{user}"}).json()
            assert body["model"]["variant"] == "champion"
            assert ranked(body) == expected
        deadline = time.monotonic() + 10
        while shadow.counts.compared < 20 and time.monotonic() < deadline:
            time.sleep(0.01)
        told = client.get("/v1/models").json()["shadow"]
    assert (told["compared"], told["dropped"], told["failed"]) == (20, 0, 0)
    answers = [dict(offline(tmp_path / f"bundle-{number}", ("i1", "i2"))) for number in (1, 2)]
    assert told["overlap"] == pytest.approx(len(answers[0].keys() & answers[1].keys()) / 5)
    lines = [json.loads(record.getMessage()) for record in caplog.records]
    assert [line["event"] for line in lines] == ["shadow"] * 20
    assert sorted(lines[0]) == [
        "challenger", "champion", "event", "k", "overlap", "recommendation_id", "score_difference", "time",
    ]  # fmt: skip
    page = client.get("/metrics").text
    assert 'seqray_shadow_comparisons{outcome="compared",replica=""} 20.0' in page
    assert 'seqray_requests_total{endpoint="recommend",replica="",status="200"} 20.0' in page
    assert 'seqray_recommendations_total{replica=""} 20.0' in page  # the challenger's lists are not returned
    assert (lines[0]["champion"], lines[0]["challenger"], lines[0]["k"]) == ("1", "2", 5)


def test_a_slow_challenger_costs_comparisons_and_no_answers(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    add_challenger(tmp_path, registry, 2)
    shadow = Shadow(capacity=2)
    service = Following(registry, shadow=shadow).service
    challenger = service.models.challenger
    assert challenger is not None
    goes_on = threading.Event()

    async def ask() -> None:
        query = Query(("i1", "i2"), 5)
        found = await service.champion.recommend(query)
        blocker = challenger._batcher._thread.submit(goes_on.wait)
        for number in range(5):
            service.compare(service.champion, lambda _recommender: query, found, f"rec_{number}")
            await service.champion.recommend(query)  # answered while the challenger hangs
        assert (shadow.counts.dropped, shadow.counts.compared) == (3, 0)
        goes_on.set()
        blocker.result()
        await asyncio.gather(*shadow._tasks)

    asyncio.run(ask())
    assert (shadow.counts.dropped, shadow.counts.compared) == (3, 2)
