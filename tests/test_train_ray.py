"""Ray Train's workers: the same data order, loss and metrics as one process, also after a worker is killed."""

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from shop_log import shop_config

from seqray.config import Config
from train.cluster import connect
from train.fit import fit
from train.runs import Run


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """One local cluster for the file, with its own folder."""
    import ray

    folder = tempfile.mkdtemp(prefix="sr", dir="/tmp")
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False,
        logging_level="ERROR", object_store_memory=200 * 2**20,
    )  # fmt: skip
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def history(config: Config) -> list[dict[str, float]]:
    """The validations of the newest run."""
    import json

    run = sorted((Path(config.output) / "runs" / config.name).iterdir())[-1]
    assert Run.load(run).status == "finished"
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    rows: list[dict[str, float]] = json.loads((checkpoint / "progress.json").read_text())["history"]
    return rows


def kill_a_worker_after(log: Path, marker: str, killed: list[int]) -> None:
    """SIGKILLs one of this process's Ray Train workers once `marker` stands in the log."""
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        logs = list(log.glob("*/train.log"))
        if logs and marker in logs[0].read_text():
            workers = [
                process for process in psutil.Process().children(recursive=True)
                if any("RayTrainWorker" in part for part in process.cmdline())
            ]  # fmt: skip
            os.kill(workers[0].pid, signal.SIGKILL)
            killed.append(workers[0].pid)
            return
        time.sleep(0.01)


@pytest.mark.timeout(600)
def test_two_workers_equal_one_process_even_when_one_is_killed(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Steps: 4 an epoch, a checkpoint every 3; uneven parts, since 60 sequences make batches of 13 and 8.
    alone = shop_config(tmp_path, train={"epochs": 40, "patience": 40, "batch_size": 13}, loss={"type": "bce"})
    two = alone.override({"name": "two", "train.num_workers": 2})
    expected = fit(alone)
    killed: list[int] = []
    runs = Path(two.output) / "runs" / "two"
    killer = threading.Thread(target=kill_a_worker_after, args=(runs, "epoch 3/40", killed))
    killer.start()
    bundle = fit(two)
    killer.join()
    printed = capsys.readouterr().out
    assert killed, "no worker was killed, so nothing was tested"
    assert "failed" in printed
    assert printed.count("goes on from checkpoint") == 1
    for one, other in zip(history(alone), history(two), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
    assert bundle.metrics["test/ndcg@10"] == pytest.approx(expected.metrics["test/ndcg@10"], abs=0.02)


def test_connect_keeps_a_cluster_that_is_there(cluster: None, tmp_path: Path) -> None:
    assert connect(shop_config(tmp_path), cpus=1) is False


@pytest.mark.timeout(600)
def test_a_model_in_shards_equals_one_process(cluster: None, tmp_path: Path) -> None:
    alone = shop_config(tmp_path, train={"epochs": 2, "batch_size": 13})
    layout = {"train.num_workers": 2, "train.parallel": "fsdp", "train.vocabulary_parallel": 2}
    shards = alone.override({"name": "shards", **layout})
    expected, bundle = fit(alone), fit(shards)
    for one, other in zip(history(alone), history(shards), strict=True):
        assert other["train/loss"] == pytest.approx(one["train/loss"], rel=1e-5)
    assert bundle.metrics["test/ndcg@10"] == pytest.approx(expected.metrics["test/ndcg@10"], abs=0.02)
    assert bundle.state.keys() == expected.state.keys()
