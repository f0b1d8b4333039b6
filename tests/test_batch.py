"""python -m serve.batch: every user scored as HTTP and the offline Recommender do, on one CPU, resumable."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
from conftest import FEATURES, ROOT, save_tiny, tiny_config, tiny_state
from shop_log import write_log
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import BundleError, ConfigError, DataError
from seqray.recommender import Query, Recommender
from seqray.sequences import SequenceStore
from seqray.storage import file_sha256
from serve.admission import Admission
from serve.application import build_application
from serve.batch import main, score_files, score_users
from serve.scoring import Plan, Scorer, ScoringWorker, WorkerSettings
from serve.served_model import ServedModel
from serve.service import Service
from train.prepare import prepare_store


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One CPU, which the worker takes: what else Ray Data does must not wait for another."""
    folder = tempfile.mkdtemp(prefix="b", dir="/tmp")  # short: Ray's sockets are below it
    ray.init(
        num_cpus=1, include_dashboard=False, _temp_dir=folder, log_to_driver=False, logging_level="ERROR",
        object_store_memory=100 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def log_of(folder: Path, num_users: int) -> None:
    """A log of the tiny bundle's items and of some that it does not know, u000 knowing none."""
    table = pq.read_table(write_log(folder, num_users))
    item_ids = [f"i{n - 95}" if user != "u000" else f"x{n}" for user, n in zip(*_columns(table), strict=True)]
    table = table.set_column(1, "item_id", pa.array(item_ids))
    table = table.append_column("what", pa.array(["view", "buy", "other"][n % 3] for n in range(len(table))))
    pq.write_table(table, folder / "shop.parquet")


def _columns(table) -> tuple[list, list]:
    return table.column("user_id").to_pylist(), table.column("item_id").to_pylist()


def batch_config(folder: Path, bundle: Bundle, num_users: int = 30, **values: object) -> Config:
    config = tiny_config().override(
        {
            "output": str(folder / "out"), "data.path": str(folder / "shop.parquet"),
            "data.store": str(folder / "store"), "cluster.address": "local", "serve.bundle": str(bundle.folder),
            "serve.batch.k": 5, "serve.batch.users_a_file": 7, "serve.batch.batch_size": 3, **values,
        }
    )  # fmt: skip
    if not (folder / "store").exists():
        log_of(folder, num_users)
        prepare_store(config)
    return config


def scores(folder: Path) -> dict[str, list[tuple]]:
    """What the output says of each user, best item first."""
    found: dict[str, list[tuple]] = {}
    for row in pq.read_table(folder).to_pylist():
        found.setdefault(row["user_id"], []).append((row["item_id"], row["score"], row["source"]))
        assert row["rank"] == len(found[row["user_id"]])
    return found


def histories(store: Path) -> dict[str, tuple]:
    opened = SequenceStore(store)
    ids = [opened.vocabulary.item_id(int(item)) for item in opened.items]
    bounds = opened.offsets.tolist()
    return {user: tuple(ids[a:b]) for user, a, b in zip(opened.user_ids.to_pylist(), bounds, bounds[1:], strict=False)}


def test_batch_http_and_offline_give_the_same(
    cluster: None, tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    config = batch_config(tmp_path, tiny_bundle)
    yaml = tmp_path / "c.yaml"
    yaml.write_text(config.yaml())
    assert main([str(yaml), "--output", str(tmp_path / "scores")]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "scoring 30 users with tiny-1, k 5: 5 files, 0 of them there already" in out
    assert "scored 30 users in" in out
    found, recommender = scores(tmp_path / "scores"), Recommender(tiny_bundle)
    service = Service("tiny", ServedModel(recommender, "tiny", "champion", 4))
    service.warm_up()
    client = TestClient(build_application(service))
    asked = histories(tmp_path / "store")
    assert list(found) == list(asked)
    for user, history in asked.items():
        [offline] = recommender.recommend([Query(history, 5)])
        assert [(item, source) for item, _, source in found[user]] == [(i.item_id, i.source) for i in offline.items]
        assert [score for _, score, _ in found[user]] == pytest.approx([i.score for i in offline.items], abs=1e-5)
        over_http = client.post("/v1/recommend", json={"history": list(history), "k": 5}).json()["items"]
        assert [item["item_id"] for item in over_http] == [item for item, _, _ in found[user]]
    assert {source for _, _, source in found["u000"]} == {"popular"}
    table = pq.read_table(tmp_path / "scores")
    assert set(table.column("model_version").to_pylist()) == {"tiny-1"}
    manifest = json.loads((tmp_path / "scores" / "_manifest.json").read_text())
    assert (manifest["users"], manifest["rows"], manifest["files"]) == (30, len(table), 5)
    assert main([str(yaml), "--output", str(tmp_path / "scores")]) == 0
    assert "complete already" in capsys.readouterr().out


def test_only_what_is_missing_is_made(cluster: None, tmp_path: Path, tiny_bundle: Bundle) -> None:
    config, output = batch_config(tmp_path, tiny_bundle), tmp_path / "scores"
    score_users(config, str(output))
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    whole = scores(output)
    (output / "part-000003.parquet").unlink()
    (output / "_manifest.json").unlink()
    score_users(config, str(output))
    after = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"part-000003.parquet", "_manifest.json"}
    assert scores(output) == whole
    with pytest.raises(DataError, match="differ in k; name another"):
        score_users(config.override({"serve.batch.k": 6}), str(output))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "precious.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds files but no _plan\.json"):
        score_users(config, str(tmp_path / "foreign"))


def test_what_fails_in_a_worker_is_said(cluster: None, tmp_path: Path, tiny_bundle: Bundle) -> None:
    config = batch_config(tmp_path, tiny_bundle)
    (tmp_path / "blocked").write_text("a file where the folder should be")
    location, settings = str(tmp_path / "store"), WorkerSettings("", Admission(), Cache(), "cpu", 1, 3)
    sha256 = file_sha256(tiny_bundle.folder / "manifest.json")
    plan = Plan(str(tiny_bundle.folder), sha256, "tiny-1", location, {}, 30, 7, 5, None, None, 0.0)
    blocked = replace(settings, output=str(tmp_path / "blocked"))
    with pytest.raises(DataError, match=r"blocked/part-000004\.parquet: cannot be written"):
        score_files(config, plan, blocked, [4])
    [error] = ScoringWorker(replace(plan, bundle_sha256="0" * 64), settings)({"number": np.array([0])})["error"]
    assert "is not the one that was registered" in error


def test_a_file_that_is_no_parquet_is_told(cluster: None, tmp_path: Path, tiny_bundle: Bundle) -> None:
    config, output = batch_config(tmp_path, tiny_bundle), tmp_path / "scores"
    score_users(config, str(output))
    (output / "_manifest.json").unlink()
    (output / "part-000001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-000001\.parquet: cannot be read as parquet"):
        score_users(config, str(output))
    (output / "part-000001.parquet").unlink()
    assert score_users(config, str(output))["users"] == 30


def test_filters_and_seen_items(cluster: None, tmp_path: Path, tiny_bundle: Bundle) -> None:
    wanted = {"field": "price", "lte": 9}
    config = batch_config(tmp_path, tiny_bundle, **{"serve.batch.filter": wanted, "serve.batch.exclude_seen": False})
    score_users(config, str(tmp_path / "scores"))
    recommender = Recommender(tiny_bundle)
    cheap = recommender.read_filter(wanted)
    for user, history in histories(tmp_path / "store").items():
        [offline] = recommender.recommend([Query(history, 5, exclude_seen=False, filter=cheap)])
        found = [item for item, _, _ in scores(tmp_path / "scores")[user]]
        assert found == [item.item_id for item in offline.items]
        assert set(found) <= {"i1", "i3", "i5", "i7", "i9"}


def test_event_types_and_times_are_asked_with(tmp_path: Path) -> None:
    config = tiny_config().override(FEATURES)
    bundle = save_tiny(tmp_path / "bundle", config=config, state=tiny_state(config))
    batch_config(tmp_path, bundle, **{"data.columns.event": "what", "data.event_types": ["view", "buy"]})
    store, recommender = SequenceStore(tmp_path / "store"), Recommender(bundle)
    plan = Plan("", "", "tiny-1", "", {}, 30, 30, 5, None, None, 1_702_000_000.0)
    rows = Scorer(plan, recommender, store, 4).table(0).to_pylist()
    user = store.user_ids.to_pylist().index("u007")
    a, b = store.offsets[user : user + 2].tolist()
    history = tuple(store.vocabulary.item_id(int(item)) for item in store.items[a:b])
    types = tuple([None, "view", "buy"][n] for n in store.event_types[a:b])
    times = tuple((store.timestamps[a:b] / 1e6).tolist())
    query = Query(history, 5, events=types, timestamps=times, now=plan.now)
    [offline] = recommender.recommend([query])
    found = [(row["item_id"], pytest.approx(row["score"], abs=1e-5)) for row in rows if row["user_id"] == "u007"]
    assert [(item.item_id, item.score) for item in offline.items] == found
    [other] = recommender.recommend([replace(query, events=(), timestamps=())])
    assert [item.score for item in other.items] != [item.score for item in offline.items]


def test_mistakes_are_told_before_the_work(tmp_path: Path, tiny_bundle: Bundle, capsys: pytest.CaptureFixture) -> None:
    config = batch_config(tmp_path, tiny_bundle)
    output = str(tmp_path / "scores")
    with pytest.raises(ConfigError, match="name the bundle"):
        score_users(config.override({"serve.bundle": None}), output)
    with pytest.raises(BundleError, match="no such folder"):
        score_users(config.override({"serve.bundle": str(tmp_path / "out")}), output)
    with pytest.raises(DataError, match=r"python -m train\.prepare"):
        score_users(config.override({"data.store": str(tmp_path / "nowhere")}), output)
    with pytest.raises(ConfigError, match=r"serve\.batch\.filter\.field"):
        score_users(config.override({"serve.batch.filter": {"field": "colour", "eq": "red"}}), output)
    yaml = tmp_path / "c.yaml"
    yaml.write_text(config.yaml())
    assert main([str(yaml)]) == 2
    assert "--output" in capsys.readouterr().err
    assert not Path(output).exists()


def test_a_killed_command_goes_on_where_it_was(tmp_path: Path, tiny_bundle: Bundle) -> None:
    config = batch_config(tmp_path, tiny_bundle, 120, **{"serve.batch.users_a_file": 1, "serve.batch.num_workers": 1})
    yaml, output = tmp_path / "c.yaml", tmp_path / "scores"
    yaml.write_text(config.yaml())
    short = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    command = [sys.executable, "-m", "serve.batch", str(yaml), "--output", str(output)]
    options = {"cwd": ROOT, "env": {**os.environ, "RAY_TMPDIR": str(short)}, "text": True}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
    deadline = time.monotonic() + 200
    while len(list(output.glob("part-*"))) < 3:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    first.kill()
    first.communicate()
    time.sleep(2)  # until its workers have seen that it is gone
    there = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 3 <= len(there) < 120
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=250, **options)
    shutil.rmtree(short, ignore_errors=True)
    assert f"120 files, {len(there)} of them there already" in done.stdout
    assert {name: (output / name).stat().st_mtime_ns for name in there} == there
    found, recommender = scores(output), Recommender(tiny_bundle)
    answers = {
        user: [item.item_id for item in recommender.recommend([Query(history, 5)])[0].items]
        for user, history in histories(tmp_path / "store").items()
    }
    assert {user: [item for item, _, _ in rows] for user, rows in found.items()} == answers
