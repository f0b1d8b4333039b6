"""POST /v1/events and the log behind it: durable before the answer, each event_id once, readable by train.prepare."""

import asyncio
import http.client
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.data_config import DataConfig
from seqray.errors import DataError
from seqray.folder import Folder
from seqray.log_reader import read_log
from seqray.recommender import Recommender
from seqray.sequences import SequenceStore
from seqray.serve_config import EventsConfig
from serve.application import build_application
from serve.compact import compact
from serve.compact import main as compact_main
from serve.event_buffer import EventBuffer, open_buffer
from serve.event_log import EventLog, Receipt, RecentIds
from serve.event_merging import MERGED_AT_A_TIME
from serve.event_table import milliseconds_of
from serve.problems import Problem
from serve.served_model import ServedModel
from serve.service import Service
from train.prepare import main as prepare_main

WINDOW = 1000


@pytest.fixture(scope="module")
def model(tiny_bundle: Bundle) -> ServedModel:
    return ServedModel(Recommender(tiny_bundle), "tiny", "champion", 4)


def client_of(model: ServedModel, folder: Path | None, **config: object) -> TestClient:
    settings = EventsConfig.model_validate({"folder": str(folder) if folder else None, **config})
    service = Service("tiny", model)
    service.events = open_buffer(settings, 7)
    return TestClient(build_application(service))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "events"


@pytest.fixture
def client(model: ServedModel, folder: Path) -> Iterator[TestClient]:
    with client_of(model, folder) as client:
        yield client


def event(number: int | str, **fields: object) -> dict[str, object]:
    return {"event_id": f"e{number}", "user_id": f"u{number}", "item_id": f"i{number}", "event": "view", **fields}


def row(number: int | str, moment: float | None = None) -> dict[str, object]:
    """As the log takes it."""
    microseconds = round((time.time() if moment is None else moment) * 1e6)
    return {**event(number), "history_id": f"u{number}", "timestamp": microseconds, "received": microseconds}


def post(client: TestClient, *events: dict[str, object]) -> tuple[int, dict]:
    response = client.post("/v1/events", json={"events": events})
    return response.status_code, response.json()


def rows(folder: Path) -> list[dict]:
    """All events of a folder, by the path of their file."""
    tables = [pq.read_table(path, partitioning=None) for path in sorted(folder.glob("date=*/*.parquet"))]
    return [one for table in tables for one in table.to_pylist()]


def ids(folder: Path) -> list[str]:
    return [one["event_id"] for one in rows(folder)]


def log_of(folder: Path) -> EventLog:
    return EventLog(Folder.at(folder), WINDOW)


def at(day: datetime) -> str:
    return f"date={day:%Y-%m-%d}"


def test_all_fields_are_kept_and_the_day_is_the_events_own_in_utc(client: TestClient, folder: Path) -> None:
    yesterday = datetime.now(UTC).replace(hour=1, minute=30, second=0, microsecond=250_000) - timedelta(days=1)
    far_east = yesterday.astimezone(timezone(timedelta(hours=-11)))  # where it is still the day before
    shown = {"recommendation_id": "rec_1", "model_version": "17", "variant": "champion", "rank": 3}
    full = event(
        1, item_id=17, session_id="s9", event="purchase", timestamp=far_east.isoformat(), value=4.5, quantity=2,
        price=9.75, **shown,
    )  # fmt: skip
    assert post(client, full, event(2, user_id=None, session_id="s2")) == (202, {"accepted": 2, "duplicates": 0})
    [one] = [one for one in rows(folder) if one["event_id"] == "e1"]
    received = one.pop("received")
    assert abs(received - datetime.now(UTC)) < timedelta(minutes=1)
    expected = {**full, "item_id": "17", "history_id": "u1", "timestamp": yesterday, "quantity": 2.0}
    assert one == expected
    assert [path.parent.name for path in folder.glob("*/*") if "e1" in pq.read_table(path)["event_id"].to_pylist()] == [
        at(yesterday)
    ]
    [other] = [one for one in rows(folder) if one["event_id"] == "e2"]
    assert (other["history_id"], other["user_id"], other["rank"]) == ("s2", None, None)
    assert other["timestamp"] == other["received"]


def test_an_event_counts_once(client: TestClient, folder: Path) -> None:
    assert post(client, event(1), event(2), event(1)) == (202, {"accepted": 2, "duplicates": 1})
    assert post(client, event(3), event(2, event="cart")) == (202, {"accepted": 1, "duplicates": 1})
    assert post(client, event(1)) == (202, {"accepted": 0, "duplicates": 1})
    assert sorted(ids(folder)) == ["e1", "e2", "e3"]
    assert {one["event"] for one in rows(folder)} == {"view"}


def test_it_counts_once_after_a_restart_too(model: ServedModel, folder: Path) -> None:
    yesterday = time.time() - 86_400
    with client_of(model, folder) as client:
        assert post(client, event(1), event(2, timestamp=yesterday))[1]["accepted"] == 2
    with client_of(model, folder) as client:
        assert post(client, event(1), event(2, timestamp=yesterday), event(3))[1] == {"accepted": 1, "duplicates": 2}
    assert sorted(ids(folder)) == ["e1", "e2", "e3"]


def test_the_window_is_bounded_and_keeps_the_newest(folder: Path) -> None:
    known = RecentIds(3)
    known.update(map(str, range(100)))
    assert [number for number in range(100) if str(number) in known] == [96, 97, 98, 99]
    log_of(folder).append([[row(number)] for number in range(10)])
    again = EventLog(Folder.at(folder), 2)
    assert again.append([[row(9), row("new")]]) == [Receipt(1, 1)]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({}, ["/events"]),
        ([], [""]),
        ({"events": []}, ["/events"]),
        ({"events": {}}, ["/events"]),
        ({"events": [event(1)], "k": 1}, ["/k"]),
        ({"events": [event(number) for number in range(501)]}, ["/events"]),
        ({"events": [event(1), "e2"]}, ["/events/1"]),
        ({"events": [{"event_id": "e1"}]}, ["/events/0/item_id", "/events/0/event"]),
        ({"events": [event(1, event_id="")]}, ["/events/0/event_id"]),
        ({"events": [event(1, event_id=7)]}, ["/events/0/event_id"]),
        ({"events": [event(1, event_id="x" * 129)]}, ["/events/0/event_id"]),
        ({"events": [event(1, item_id=1.5)]}, ["/events/0/item_id"]),
        ({"events": [event(1), event(2, colour="red", rnak=1)]}, ["/events/1/colour", "/events/1/rnak"]),
        ({"events": [event(1, user_id=None)]}, ["/events/0"]),
        ({"events": [event(1, timestamp="yesterday")]}, ["/events/0/timestamp"]),
        ({"events": [event(1, timestamp=1_700_000_000_000)]}, ["/events/0/timestamp"]),
        ({"events": [event(1), event(2, timestamp="1999-12-31")]}, ["/events/1/timestamp"]),
        ({"events": [event(1, rank=0)]}, ["/events/0/rank"]),
        ({"events": [event(1, rank=1.0)]}, ["/events/0/rank"]),
        ({"events": [event(1, price="9.75")]}, ["/events/0/price"]),
        ({"events": [event(1, value=True)]}, ["/events/0/value"]),
        ({"events": [event(1, user_id="\ud800")]}, ["/events/0/user_id"]),
    ],
)
def test_a_mistake_is_named_and_nothing_is_kept(
    client: TestClient, folder: Path, body: object, expected: list[str]
) -> None:
    response = client.post("/v1/events", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert [error["pointer"] for error in response.json()["errors"]] == expected
    assert not folder.exists()


def test_a_number_too_large_for_json_is_refused(client: TestClient) -> None:
    body = json.dumps({"events": [event(1, value=1.5)]}).replace("1.5", "1e999")
    response = client.post("/v1/events", content=body, headers={"Content-Type": "application/json"})
    assert [error["pointer"] for error in response.json()["errors"]] == ["/events/0/value"]


def test_the_largest_request_is_taken(client: TestClient, folder: Path) -> None:
    assert post(client, *(event(number, session_id="s" * 256) for number in range(500)))[1]["accepted"] == 500
    assert len(set(ids(folder))) == 500


def test_without_a_folder_the_answer_says_what_to_set(model: ServedModel) -> None:
    status, body = post(client_of(model, None), event(1))
    assert (status, body["code"]) == (404, "NOT_FOUND")
    assert "serve.events.folder" in body["detail"]


def test_openapi_knows_events(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    assert "202" in document["paths"]["/v1/events"]["post"]["responses"]
    assert document["components"]["schemas"]["LoggedEvent"]["required"] == ["event_id", "item_id", "event"]


class Storage:
    """Storage that a test holds up."""

    def __init__(self, folder: Path) -> None:
        self.log, self.open, self.lists = log_of(folder), threading.Event(), []

    def append(self, lists: Sequence[Sequence[dict]]) -> list[Receipt]:
        assert self.open.wait(60)
        self.lists.append([[one["event_id"] for one in rows] for rows in lists])
        return self.log.append(lists)


async def settled(buffer: EventBuffer, *numbers: int) -> list[Receipt | Problem]:
    """What each of several requests that come at once gets."""
    found = await asyncio.gather(*(buffer.add([row(n)] * 250, 1000) for n in numbers), return_exceptions=True)
    return [one for one in found if isinstance(one, Receipt | Problem)]


def test_requests_that_come_together_share_a_file(folder: Path) -> None:
    storage = Storage(folder)
    storage.open.set()
    buffer = EventBuffer(storage.append, EventsConfig(folder=str(folder)), 7)
    assert asyncio.run(settled(buffer, 1, 2, 3, 1)) == [Receipt(1, 249)] * 3 + [Receipt(0, 250)]
    assert len(storage.lists) == 1
    assert len(list(folder.glob("*/*"))) == 1


@pytest.mark.parametrize("limits", [{"max_buffered_events": 500}, {"max_buffered_mib": 4}])
def test_a_full_buffer_is_a_503_and_takes_again_what_fits(folder: Path, limits: dict[str, int]) -> None:
    storage = Storage(folder)
    buffer = EventBuffer(storage.append, EventsConfig(folder=str(folder), **limits), 7)
    rows, size = [row(1)] * 250, 2**21

    async def ask() -> None:
        held = [asyncio.ensure_future(buffer.add(rows, size)) for _ in range(2)]
        await asyncio.sleep(0.05)
        with pytest.raises(Problem) as full:
            await buffer.add(rows, size)
        assert (full.value.status, full.value.headers) == (503, {"Retry-After": "7"})
        storage.open.set()
        assert await asyncio.gather(*held) == [Receipt(1, 249), Receipt(0, 250)]
        assert await buffer.add(rows, size) == Receipt(0, 250)

    asyncio.run(ask())


def test_slow_storage_is_a_503_and_the_events_count_once(folder: Path) -> None:
    storage = Storage(folder)
    buffer = EventBuffer(storage.append, EventsConfig(folder=str(folder), commit_timeout_s=0.1), 7)

    async def ask() -> None:
        with pytest.raises(Problem, match="in time") as late:
            await buffer.add([row(1)], 100)
        assert late.value.status == 503
        storage.open.set()
        assert await buffer.add([row(1), row(2)], 100) == Receipt(1, 1)

    asyncio.run(ask())
    assert ids(folder) == ["e1", "e2"]


def test_failing_storage_is_a_503_until_it_is_back(client: TestClient, folder: Path) -> None:
    folder.write_text("a file where the folder should be")
    response = client.post("/v1/events", json={"events": [event(1)]})
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")
    assert "file where" not in response.text
    assert str(folder) not in response.text
    folder.unlink()
    assert post(client, event(1)) == (202, {"accepted": 1, "duplicates": 0})
    assert ids(folder) == ["e1"]


def test_what_was_written_before_storage_failed_counts_once(client: TestClient, folder: Path) -> None:
    now = datetime.now(UTC)
    folder.mkdir()
    blocked = folder / at(now - timedelta(days=3))
    blocked.write_text("no folder")
    events = [event(1), event(2, timestamp=(now - timedelta(days=3)).isoformat())]
    assert post(client, *events)[0] == 503
    assert ids(folder) == ["e1"]
    blocked.unlink()
    assert post(client, *events) == (202, {"accepted": 1, "duplicates": 1})
    assert sorted(ids(folder)) == ["e1", "e2"]


def test_a_killed_server_lost_nothing_that_it_answered_for(tiny_bundle: Bundle, folder: Path, free_port: int) -> None:
    command = [sys.executable, str(ROOT / "tests" / "event_server.py"), str(tiny_bundle.folder), str(folder)]
    answered: list[str] = []
    for wanted in (1, 40):  # killed with requests on their way, right after an answer
        server = subprocess.Popen([*command, str(free_port)])
        try:
            _wait_for(free_port, server)
            with ThreadPoolExecutor(4) as senders:
                jobs = [senders.submit(_send_until_it_ends, free_port, answered) for _ in range(4)]
                deadline = time.monotonic() + 60
                before = len(answered)
                while len(answered) < before + wanted:
                    assert time.monotonic() < deadline
                    time.sleep(0.001)
                server.kill()
                assert [job.result() for job in jobs] == [None] * 4
        finally:
            server.kill()
            server.wait()
    there = ids(folder)
    assert len(answered) >= 41
    assert set(answered) <= set(there)
    assert len(there) == len(set(there))


def _wait_for(port: int, server: subprocess.Popen) -> None:
    deadline = time.monotonic() + 100
    while True:
        assert server.poll() is None and time.monotonic() < deadline
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/healthz/live")
            connection.getresponse().read()
            return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()


def _send_until_it_ends(port: int, answered: list[str]) -> None:
    while True:
        events = [event(uuid.uuid4().hex) for _ in range(3)]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            body = json.dumps({"events": events})
            connection.request("POST", "/v1/events", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            return
        finally:
            connection.close()
        assert response.status == 202
        answered += [str(one["event_id"]) for one in events]


def test_small_files_are_merged_while_events_come(folder: Path) -> None:
    log = log_of(folder)
    for number in range(2 * MERGED_AT_A_TIME + 5):
        log.append([[row(number)]])
    log.close()
    [day] = folder.iterdir()
    assert len(list(day.iterdir())) == 2 + 5
    # In the order in which they came, files of merged ones among it.
    assert ids(folder) == [f"e{number}" for number in range(2 * MERGED_AT_A_TIME + 5)]


def test_two_writers_and_a_compaction_at_once_lose_and_double_nothing(folder: Path) -> None:
    done = threading.Event()

    def write(first: int) -> None:
        log = log_of(folder)
        for number in range(first, first + 150):  # each shares 100 events with the next
            log.append([[row(number)], [row(number), row(f"{number}-{first}")]])
        log.close()

    def compact_all_the_time() -> int:
        rounds = 0
        while not done.is_set():
            compact(Folder.at(folder), min_age_s=0)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as threads:
        writers = [threads.submit(write, first) for first in (0, 50)]
        compacting = threads.submit(compact_all_the_time)
        for writer in writers:
            writer.result()
        done.set()
        assert compacting.result() > 0
    expected = {f"e{n}" for n in range(200)}
    expected |= {f"e{n}-{first}" for first in (0, 50) for n in range(first, first + 150)}
    assert set(ids(folder)) == expected
    compact(Folder.at(folder), min_age_s=0)
    found = ids(folder)
    assert (len(found), set(found)) == (len(expected), expected)


def test_a_log_is_read_whole_while_its_files_become_others(folder: Path) -> None:
    columns = {"user_id": "history_id", "event_id": "event_id"}
    data = DataConfig.model_validate({"path": str(folder), "columns": columns})
    written: list[str] = []
    log = log_of(folder)
    log.append([[row("first")]])

    def write() -> None:
        for number in range(6 * MERGED_AT_A_TIME):
            log.append([[row(number)]])
            written.append(f"u{number}")
        log.close()

    with ThreadPoolExecutor(1) as threads:
        writing = threads.submit(write)
        reads = 0
        while not writing.done():
            before = set(written)
            users = read_log(data).events.user_ids.to_pylist()
            assert before <= set(users)
            assert EventLog(Folder.at(folder), WINDOW).append([[row("first")]]) == [Receipt(0, 1)]
            reads += 1
        writing.result()
    assert reads > 3
    events = read_log(data).events
    assert len(events) == len(events.user_ids) == 6 * MERGED_AT_A_TIME + 1


def test_compacting_leaves_foreign_files_alone_and_old_leftovers_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log_of(folder).append([[row(1)]])
    log_of(folder).append([[row(2)]])
    [day] = folder.iterdir()
    first = min(day.glob("events-*")).name
    old = day / f".events-1700000000000-{first[21:33]}-000001.parquet.0123abcd"
    old.write_bytes(b"half a fi")
    new = day / f".{first}.0123abcd"
    new.write_bytes(b"half a fi")
    for path in day.glob("events-*"):
        path.rename(day / f"events-{milliseconds_of(path.name) - 3_600_000}{path.name[20:]}")
    pq.write_table(pa.table({"mine": [1]}), day / "mine.parquet")
    yaml = folder.parent / "c.yaml"
    yaml.write_text(f"name: c\ndata: {{path: log.csv}}\nserve: {{events: {{folder: '{folder}'}}}}\n")
    assert compact_main([str(yaml)]) == 0
    out = capsys.readouterr().out
    assert f"{day.name}: 2 files -> 1" in out
    assert f"data.path={folder}" in out
    [compacted] = [path.name for path in day.iterdir() if path.name.startswith("compact-")]
    assert {path.name for path in day.iterdir()} == {compacted, new.name, "mine.parquet"}
    assert compact_main([str(yaml)]) == 0
    assert "compacted 0 day(s)" in capsys.readouterr().out
    assert compact_main([str(yaml), "serve.events.folder=null"]) == 2


def test_a_damaged_file_stops_compaction_and_nothing_is_deleted(folder: Path) -> None:
    log_of(folder).append([[row(1)]])
    log_of(folder).append([[row(2)]])
    before = sorted(folder.glob("*/*"))
    before[1].write_bytes(b"PAR1")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        compact(Folder.at(folder), min_age_s=0)
    assert sorted(folder.glob("*/*")) == before


def test_the_log_closes_the_loop(client: TestClient, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.time() - 86_400 * 5
    acts = [
        event(f"{user}-{n}", user_id=user, item_id=f"i{n}", event=kind, timestamp=start + 3600 * n)
        for user in ("anna", "ben") for n, kind in enumerate(["view", "cart", "purchase", "impression", "view"])
    ]  # fmt: skip
    session = [event(f"s-{n}", user_id=None, session_id="s1", item_id=f"i{n}", timestamp=start + n) for n in range(3)]
    assert post(client, *acts, *session)[0] == 202
    log_of(folder / "elsewhere").append([[row("ben-0", start)]])  # what another replica took a second time
    [twice] = (folder / "elsewhere").glob("*/*")
    twice.rename(folder / twice.parent.name / twice.name)
    yaml = folder.parent / "c.yaml"
    yaml.write_text(
        f"""name: loop
data:
  path: {folder}
  columns: {{user_id: history_id, item_id: item_id, timestamp: timestamp, event: event, event_id: event_id}}
  keep_events: [view, cart, purchase]
  event_types: [view, cart, purchase]
  store: {folder.parent / "store"}
"""
    )
    assert prepare_main([str(yaml)]) == 0, capsys.readouterr().err
    store = SequenceStore(folder.parent / "store")
    assert store.user_ids.to_pylist() == ["anna", "ben", "s1"]
    item = store.vocabulary.item_id
    histories = [[item(i) for i in store.items[a:b]] for a, b in zip(store.offsets, store.offsets[1:], strict=False)]
    assert histories == [["i0", "i1", "i2", "i4"]] * 2 + [["i0", "i1", "i2"]]
    assert store.event_types.tolist() == [1, 2, 3, 1] * 2 + [1] * 3
    counts = store.manifest["counts"]
    assert (counts["other_events"], counts["repeated_events"], counts["quarantined"]) == (2, 1, {})
