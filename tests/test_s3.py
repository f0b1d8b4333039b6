"""Data, store, runs, checkpoints and bundles on S3 alone: nothing of a run needs a disk that two machines share."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import ENVIRONMENT, Bucket, s3_server
from safetensors.torch import load
from shop_log import shop_config, write_log

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import BundleError, ConfigError, DataError
from seqray.folder import Folder
from serve.compact import compact
from serve.event_log import EventLog, Receipt
from serve.event_table import days, files_of, read
from train.evaluate import evaluate_rows
from train.fit import Trial, fit
from train.prepare import ensure_store
from train.runs import Run, StaleAttempt, check_attempt


@pytest.fixture(scope="module")
def environment() -> Iterator[None]:
    """Credentials as a user gives them; no region is looked up in the cloud."""
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        yield


@pytest.fixture(scope="module")
def bucket(environment: None, module_port: int) -> Iterator[Bucket]:
    with s3_server(module_port) as bucket:
        yield bucket


def remote(bucket: Bucket, folder: Path, name: str, **sections: dict[str, object]) -> Config:
    """The tests' shop with log, store, runs and bundles on S3; the cache is the only local folder."""
    if not (folder / "log.parquet").exists():
        write_log(folder)
    log = bucket.put_file(f"logs/{name}.parquet", folder / "log.parquet")
    return shop_config(folder, name=name, **sections).override(
        {"data.path": log, "output": bucket.uri("out"), "data.store": "", "cluster.cache_folder": str(folder / "cache")}
    )


def same_weights(one: Bundle, other: Bundle) -> bool:
    return (one.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()


def test_a_run_on_s3_alone_equals_a_local_one(bucket: Bucket, tmp_path: Path) -> None:
    bundle = fit(remote(bucket, tmp_path, "alone", tracking={"mode": "offline"}))
    local = fit(shop_config(tmp_path, tracking={"mode": "disabled"}))
    assert same_weights(bundle, local)
    run = Run.load(bucket.uri(f"out/runs/alone/{bundle.version}"))
    assert run.status == "finished"
    assert bundle.location == bucket.uri(f"out/bundles/alone/{bundle.version}")
    assert b"epoch 4/4" in bucket.read(f"out/runs/alone/{run.id}/train.log")
    assert any(key.endswith("_end/manifest.json") for key in bucket.keys(f"out/runs/alone/{run.id}/checkpoints"))
    assert any(f"-{run.id}/run-{run.id}.wandb" in key for key in bucket.keys("out/wandb"))
    assert {path.name for path in tmp_path.iterdir()} == {"log.parquet", "cache", "out"}


def test_a_run_on_s3_goes_on_to_the_last_bit(bucket: Bucket, tmp_path: Path) -> None:
    class PowerCut(Exception):
        """Ends a run from outside the training code."""

    def cut(metrics: object) -> None:
        raise PowerCut

    config = remote(bucket, tmp_path, "cut")
    ensure_store(config)
    with pytest.raises(PowerCut):
        fit(config, trial=Trial("t1", Folder.at(bucket.uri("search")), cut))
    shutil.rmtree(tmp_path / "cache")  # another machine goes on
    resumed = fit(config, trial=Trial("t1", Folder.at(bucket.uri("search"))))
    log = bucket.read("search/trials/t1/train.log").decode()
    assert "goes on from checkpoint" in log
    assert log.count("run t1:") == 2
    assert same_weights(resumed, fit(shop_config(tmp_path)))


def test_events_on_s3_are_there_once_and_compacted(bucket: Bucket) -> None:
    def row(number: int) -> dict[str, object]:
        moment = time.time_ns() // 1000
        about = {"event_id": f"e{number}", "user_id": "u", "history_id": "u", "item_id": "i", "event": "view"}
        return {**about, "timestamp": moment, "received": moment}

    def stored() -> list[str]:
        files = [file for day in days(folder) for file in files_of(folder / day)]
        return [event_id for file in files for event_id in read(file).column("event_id").to_pylist()]

    folder = Folder.at(bucket.uri("events"))
    assert EventLog(folder, 100).append([[row(1), row(2)], [row(2)]]) == [Receipt(2, 0), Receipt(0, 1)]
    assert EventLog(folder, 100).append([[row(2), row(3)]]) == [Receipt(1, 1)]
    assert (len(bucket.keys("events")), sorted(stored())) == (2, ["e1", "e2", "e3"])
    compact(folder, min_age_s=0)
    assert (len(bucket.keys("events")), sorted(stored())) == (1, ["e1", "e2", "e3"])
    with pytest.raises(DataError, match="NO_SUCH_BUCKET"):
        EventLog(Folder.at(bucket.uri("events").replace("bucket", "no-bucket")), 100).append([[row(1)]])


def test_a_newer_command_takes_a_run_over(bucket: Bucket) -> None:
    folder = bucket.uri("runs/r1")
    run = Run(Folder.at(folder), "r1", "shop", {}, "content").save()
    with run.lock():
        first = run.next_attempt()
    with run.lock():  # a second command on another machine, which saw the record before the first one wrote it
        second = Run(run.folder, "r1", "shop", {}, "content").save().next_attempt()
    assert first.attempt == second.attempt
    check_attempt(folder, second.attempt, second.owner)
    with pytest.raises(StaleAttempt):
        check_attempt(folder, first.attempt, first.owner)


def test_a_copy_that_differs_from_its_manifest_is_refused(bucket: Bucket, tmp_path: Path) -> None:
    bundle = fit(remote(bucket, tmp_path, "flipped", train={"epochs": 1}))
    weights = f"out/bundles/flipped/{bundle.version}/model.safetensors"
    content = bucket.read(weights)
    bucket.write(weights, content[:-1] + bytes([content[-1] ^ 1]))
    assert Bundle.load(bundle.location, cache=Cache(tmp_path / "cache")).version == bundle.version
    with pytest.raises(DataError, match=r"model\.safetensors does not match"):
        Bundle.load(bundle.location, cache=Cache(tmp_path / "another"))
    assert not [path for path in (tmp_path / "another").iterdir() if path.is_dir()]


def test_a_half_uploaded_bundle_is_written_anew(bucket: Bucket, tmp_path: Path) -> None:
    config = remote(bucket, tmp_path, "half", train={"epochs": 1})
    bundle = fit(config)
    run = Run.load(bucket.uri(f"out/runs/half/{bundle.version}")).mark("unfinished")
    bucket.filesystem.delete_file(f"bucket/out/bundles/half/{run.id}/manifest.json")
    again = fit(config)
    assert again.version == bundle.version
    assert load((again.folder / "model.safetensors").read_bytes()).keys() == bundle.state.keys()


def test_a_bundle_on_s3_is_evaluated_and_started_from(bucket: Bucket, tmp_path: Path) -> None:
    config = remote(bucket, tmp_path, "parent", train={"epochs": 1})
    parent = fit(config)
    rows = evaluate_rows(config.override({"evaluate.bundle": parent.location}))
    assert rows["sasrec"]["test/ndcg@10"] == parent.metrics["test/ndcg@10"]
    child = fit(config.override({"name": "child", "train.init_from": parent.location}))
    assert child.manifest["parent"] == parent.version


def test_a_bundle_on_s3_is_served(bucket: Bucket, tmp_path: Path) -> None:
    from serve.replica import Replica

    bundle = fit(remote(bucket, tmp_path, "served", train={"epochs": 1}))
    replica = Replica(bundle.location, (), "served", {"max_batch_size": 4}, Cache(tmp_path / "another node"))
    assert replica.service.ready
    assert replica.service.champion.version == bundle.version


@pytest.mark.slow
def test_a_search_on_s3(bucket: Bucket, tmp_path: Path) -> None:
    config = remote(bucket, tmp_path, "search", train={"epochs": 2, "num_workers": 1})
    path = tmp_path / "search.yaml"
    path.write_text(config.yaml())
    space = "tune.space={train.learning_rate: {loguniform: [0.001, 0.1]}}"
    command = [
        sys.executable,
        "-m",
        "tune",
        str(path),
        space,
        "tune.num_trials=2",
        "--json",
        str(tmp_path / "out.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    winner = json.loads((tmp_path / "out.json").read_text())["bundle"]
    assert winner.startswith(f"s3://{bucket.name}/out/bundles/search/")
    [search] = {key.split("/")[3] for key in bucket.keys("out/searches/search")}
    assert f"out/searches/search/{search}/search.png" in bucket.keys("out/searches/search")


def test_credentials_in_a_uri_are_refused_and_not_repeated(tmp_path: Path) -> None:
    uri = "s3://AKIA:hunter2@bucket/log.parquet"
    for change in ({"data.path": uri}, {"output": uri}, {"serve.bundle": uri}, {"evaluate.bundle": uri}):
        with pytest.raises(ConfigError, match="environment") as error:
            shop_config(tmp_path).override(change)
        assert "hunter2" not in str(error.value)
    with pytest.raises(DataError) as refused:
        Folder.at(uri).names()
    assert "hunter2" not in str(refused.value)


def test_a_place_that_is_not_there_is_an_error_of_one_line(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing complete"):
        Bundle.load(bucket.uri("nowhere"), cache=Cache(tmp_path))
    with pytest.raises((DataError, BundleError)):
        Bundle.load("s3://bucket/x?scheme=http&endpoint_override=127.0.0.1:1", cache=Cache(tmp_path))


def test_several_processes_of_a_node_fetch_a_store_once(bucket: Bucket, tmp_path: Path) -> None:
    config = remote(bucket, tmp_path, "once")
    ensure_store(config)
    code = "import pathlib, sys, seqray.cache as c; print(c.Cache(pathlib.Path(sys.argv[1])).fetch(sys.argv[2]).stat())"
    command = [sys.executable, "-c", code, str(tmp_path / "node"), config.data.store]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(4)]
    printed = [process.communicate(timeout=120)[0] for process in processes]
    assert len(set(printed)) == 1 and printed[0]
    assert len([path for path in (tmp_path / "node").iterdir() if path.is_dir()]) == 1


def test_old_copies_go_when_another_is_fetched(bucket: Bucket, tmp_path: Path) -> None:
    for name in ("old", "new"):
        bucket.write(f"published/{name}/manifest.json", json.dumps({"files": {}, "name": name}).encode())
    cache = Cache(tmp_path, days=1)
    old = cache.fetch(bucket.uri("published/old"))
    os.utime(old / "manifest.json", (0, 0))
    assert cache.fetch(bucket.uri("published/old")) == old and old.exists()  # asked for again: young again
    os.utime(old / "manifest.json", (0, 0))
    cache.fetch(bucket.uri("published/new"))
    assert not old.exists()
