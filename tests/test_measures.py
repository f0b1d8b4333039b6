"""What a replica counts and logs: the numbers, their names in Prometheus and the dashboard, and what stays out."""

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import pytest
from conftest import ROOT
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.recommender import Recommender
from seqray.serve_config import ServeConfig
from serve.application import build_application
from serve.journal import ERRORS_PER_S, LOGGER, Journal
from serve.keys import KeyFile
from serve.measures import (
    COUNTERS,
    EVENTS_ACCEPTED,
    GAUGES,
    HISTOGRAMS,
    MODEL,
    REQUESTS,
    SECONDS,
    Buckets,
    Measures,
)
from serve.middleware import ProblemMiddleware
from serve.ray_measures import counter_names
from serve.record import STAGES, Record, current
from serve.served_model import ServedModel
from serve.service import Models, Service
from serve.trace import pass_on

RANKING = set(STAGES) - {"store"}
"""The stages of a request that ranks."""
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"


@pytest.fixture
def service(tiny_bundle: Bundle) -> Service:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 8))
    service.warm_up()
    return service


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    application = build_application(service, settings=ServeConfig(log={"sample": 1.0}))  # type: ignore[arg-type]
    with TestClient(ProblemMiddleware(application)) as client:
        yield client


def samples(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values but the replica's in the order of their names) -> value."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values = [value for label, value in sorted(sample.labels.items()) if label != "replica"]
            found[sample.name, *values] = sample.value
    return found


def logged(caplog: pytest.LogCaptureFixture) -> list[dict]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == LOGGER.name]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger=LOGGER.name)
    return caplog


def test_requests_are_counted_by_endpoint_and_status(client: TestClient) -> None:
    for _ in range(3):
        client.post("/v1/recommend", json={"history": ["i1", "zz"], "k": 3})
    client.post("/v1/recommend", json={"user_id": "nobody"})
    client.post("/v1/recommend", json={"k": 0})
    client.get("/v1/users/u42/secrets")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = samples(answer.text)
    assert found["seqray_requests_total", "recommend", "200"] == 4
    assert found["seqray_requests_total", "recommend", "400"] == 1
    assert found["seqray_requests_total", "other", "404"] == 1
    assert found["seqray_recommendations_total",] == 4
    assert found["seqray_fallbacks_total",] == 1
    assert found["seqray_unknown_items_total",] == 3
    assert found["seqray_batch_size_count",] == found["seqray_batch_size_sum",] == 4
    assert found["seqray_model", "tiny", "champion", "tiny-1"] == 1
    assert found["seqray_waiting_requests", "champion"] == 0
    assert "u42" not in answer.text
    assert "i1" not in answer.text


def test_stages_add_up_to_the_whole(client: TestClient) -> None:
    for _ in range(5):
        client.post("/v1/recommend", json={"history": ["i1"] * 8})
    found = samples(client.get("/metrics").text)
    spent = {stage: found["seqray_stage_seconds_sum", "recommend", stage] for stage in RANKING}
    assert all(seconds > 0 for seconds in spent.values())
    assert {found["seqray_stage_seconds_count", "recommend", stage] for stage in RANKING} == {5}
    whole = spent.pop("total")
    assert 0.3 * whole < sum(spent.values()) <= whole * 1.001


def test_the_first_bucket_ends_at_half_a_millisecond() -> None:
    buckets = Buckets(SECONDS)
    for value in (0.0001, 0.0005, 0.00051, 3.0, 60.0):
        buckets.observe(value)
    counts = dict(buckets.cumulative())
    assert (counts["0.0005"], counts["0.001"], counts["5.0"], counts["+Inf"]) == (2, 3, 4, 5)
    assert buckets.total == pytest.approx(63.00111)


def test_refusals_are_counted(service: Service, tmp_path: Path) -> None:
    file = KeyFile(str(tmp_path / "keys.json"))
    secret, watcher = file.add("shop"), file.add("watch", ["metrics"])
    keys = {"required": "always", "file": file.location, "rate_per_s": 0.001, "burst": 2}
    with TestClient(build_application(service, settings=ServeConfig(keys=keys))) as client:  # type: ignore[arg-type]
        for key in (secret, secret, secret, watcher, "seqray_wrong"):
            client.post("/v1/recommend", json={}, headers={"Authorization": f"Bearer {key}"})
        client.post("/v1/recommend", json={})
        text = client.get("/metrics", headers={"Authorization": f"Bearer {watcher}"}).text
    found = samples(text)
    assert found["seqray_rate_limited_total", "shop"] == 1
    assert {reason: found["seqray_keys_refused_total", reason] for reason in ("no key", "wrong key", "scope")} == {
        "no key": 1, "wrong key": 1, "scope": 1,
    }  # fmt: skip
    assert secret not in text
    assert watcher not in text


def test_events_are_counted_by_the_record() -> None:
    record, measures = Record("events"), Measures("r")
    record.events, record.status = 7, 202
    measures.done(record)
    assert {family: number for family, _, number in measures.counters()} == {REQUESTS: 1, EVENTS_ACCEPTED: 7}


def test_every_metric_has_the_label_replica() -> None:
    measures = Measures("r1")
    for family in COUNTERS:
        measures.count(family, tuple("x" for _ in family.labels))
    for family in HISTOGRAMS:
        measures.observe(family, tuple("x" for _ in family.labels), 1.0)
    for family in GAUGES:
        measures.watch(family, lambda family=family: {tuple("x" for _ in family.labels): 1.0})  # type: ignore[misc]
    families = list(text_string_to_metric_families(measures.text().decode()))
    assert len(families) == len(COUNTERS) + len(HISTOGRAMS) + len(GAUGES)
    assert all(sample.labels["replica"] == "r1" for family in families for sample in family.samples)


def exported_names() -> set[str]:
    """What Ray's export calls them; see the check in test_serve_http.py against a real one."""
    return {f"ray_{name}_total" for name, _, _ in counter_names()} | {f"ray_{family.name}" for family in GAUGES}


def test_the_dashboard_asks_for_metrics_and_labels_that_exist() -> None:
    text = (ROOT / "docs" / "grafana" / "seqray-serving.json").read_text(encoding="utf-8")
    board = json.loads(text)
    queries = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(queries) >= 15
    assert {name for query in queries for name in re.findall(r"\b\w*seqray_\w+", query)} == exported_names()
    known = {"le", "replica", "application", "deployment"}
    known |= {label for family in (*COUNTERS, *HISTOGRAMS, *GAUGES) for label in family.labels}
    used = {label for query in queries for label in re.findall(r"(\w+)(?:=~|!=|=)", query)}
    used |= {
        label.strip()
        for query in queries
        for group in re.findall(r"by \(([^)]*)\)", query)
        for label in group.split(",")
    }
    assert used <= known
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_guide_names_every_metric() -> None:
    guide = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    names = [f"{family.name}_total" for family in COUNTERS] + [family.name for family in (*HISTOGRAMS, *GAUGES)]
    assert [name for name in names if f"`{name}`" not in guide] == []


def test_a_line_tells_of_the_request_and_nothing_of_the_user(client: TestClient, lines) -> None:
    history = [{"item_id": "i1", "event": "purchase-x"}, {"item_id": "zz-unknown"}]
    body = {"user_id": "u42-private", "session_id": "s9-private", "history": history, "exclude_items": ["i7-private"]}
    client.post(
        "/v1/recommend?user=u42-private", json=body,
        headers={"X-Request-Id": "shop-17", "traceparent": PARENT, "Cookie": "c-private", "User-Agent": "a-private"},
    )  # fmt: skip
    client.post("/v1/recommend", json={**body, "k": 0, "f-private": 1})
    client.get("/v1/users/u42-private")
    client.post("/v1/recommend", content=b'{"user_id": "u42-private', headers={"Content-Type": "application/json"})
    first, *others = logged(lines)
    assert len(others) == 3
    times = first.pop("ms")
    assert sorted(times) == sorted(RANKING)
    assert first.pop("time").endswith("+00:00")
    assert first == {
        "request_id": "shop-17", "trace_id": TRACE, "endpoint": "recommend", "status": 200, "model_version": "tiny-1",
        "key": None, "replica": "",
    }  # fmt: skip
    for private in ("private", "purchase-x", "zz-unknown", "i1"):
        assert private not in lines.text
    assert [line["status"] for line in others] == [400, 404, 400]


def test_a_line_names_the_key_and_never_shows_it(service: Service, tmp_path: Path, lines) -> None:
    file = KeyFile(str(tmp_path / "keys.json"))
    secret = file.add("shop")
    settings = ServeConfig(keys={"required": "always", "file": file.location}, log={"sample": 1.0})  # type: ignore[arg-type]
    with TestClient(build_application(service, settings=settings)) as client:
        client.post("/v1/recommend", json={}, headers={"Authorization": f"Bearer {secret}"})
        client.get("/metrics", headers={"Authorization": f"Bearer {secret}"})
        client.post("/v1/recommend", json={}, headers={"Authorization": f"Bearer {secret}x"})
    assert [(line["status"], line["key"]) for line in logged(lines)] == [(200, "shop"), (403, "shop"), (401, None)]
    assert secret not in lines.text
    assert secret.removeprefix("seqray_")[:10] not in lines.text


def test_requests_are_sampled_and_errors_are_not(lines) -> None:
    never, always = Journal(0.0), Journal(1.0)
    fine, wrong = Record("recommend"), Record("recommend")
    fine.status, wrong.status = 200, 500
    never.note(fine)
    assert logged(lines) == []
    always.note(fine)
    never.note(wrong)
    assert [line["status"] for line in logged(lines)] == [200, 500]
    half = Journal(0.5)
    for _ in range(2000):
        half.note(fine)
    assert 800 < len(logged(lines)) - 2 < 1200


def test_a_flood_of_errors_is_cut_and_told(lines, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("serve.journal.time.monotonic", lambda: now[0])
    journal, refused = Journal(), Record("recommend")
    refused.status = 401
    for _ in range(ERRORS_PER_S + 30):
        journal.note(refused)
    assert len(logged(lines)) == ERRORS_PER_S
    now[0] = 101.0
    journal.note(refused)
    assert logged(lines)[-1]["left_out"] == 30
    journal.note(refused)
    assert "left_out" not in logged(lines)[-1]


def test_a_traceparent_is_passed_on_with_the_answer(client: TestClient) -> None:
    passed_on = client.get("/healthz/live", headers={"traceparent": PARENT}).headers["traceparent"]
    version, trace, span, flags = passed_on.split("-")
    assert (version, trace, flags) == ("00", TRACE, "01")
    assert re.fullmatch(r"[0-9a-f]{16}", span)
    assert span != "00f067aa0ba902b7"
    refused = client.get("/nowhere", headers={"traceparent": PARENT})
    assert refused.headers["traceparent"].split("-")[1] == TRACE
    assert "traceparent" not in client.get("/healthz/live").headers


@pytest.mark.parametrize(
    "given",
    [
        "", "00", PARENT + "0", PARENT + "-x", PARENT.upper(), f"ff-{TRACE}-00f067aa0ba902b7-01",
        PARENT.replace(TRACE, "0" * 32), f"00-{TRACE}-{'0' * 16}-01", PARENT + "\r\nX: y", "00-" + "x" * 300,
    ],
)  # fmt: skip
def test_a_traceparent_that_is_none_is_left_alone(given: str) -> None:
    assert pass_on(given.encode()) is None


def test_a_later_version_of_traceparent_is_read() -> None:
    found = pass_on(f"01-{TRACE}-00f067aa0ba902b7-01-more".encode())
    assert found is not None
    assert found[0] == TRACE
    assert found[1].startswith(b"00-" + TRACE.encode())


def test_outside_of_a_request_nothing_is_kept() -> None:
    current().answered(True, 5)
    assert current().fallbacks == 0


def test_a_request_costs_little() -> None:
    measures, rounds = Measures("r"), 2000
    best = 1.0
    for _ in range(5):
        started = perf_counter()
        for _ in range(rounds):
            record = Record("recommend")
            record.status = 200
            for stage in STAGES:
                record.lap(stage)
            measures.done(record)
        best = min(best, (perf_counter() - started) / rounds)
    assert best < 100e-6  # about 6 microseconds on a quiet machine


def test_the_models_are_those_of_now(service: Service) -> None:
    def shown() -> list[tuple[str, ...]]:
        return [labels for family, labels, _ in service.measures.gauges() if family == MODEL]

    assert shown() == [("tiny", "tiny-1", "champion")]
    recommender = service.champion.recommender
    champion, challenger = (ServedModel(recommender, "tiny", "champion", 8, version) for version in ("2", "3"))
    service.put(Models(champion, challenger.as_variant("challenger"), 0.5))
    assert shown() == [("tiny", "2", "champion"), ("tiny", "3", "challenger")]
