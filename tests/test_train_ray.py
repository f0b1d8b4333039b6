"""Ray Train's workers: the same data order, loss and metrics as one process, whatever happens to a worker."""

import json
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

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
    run = sorted((Path(config.output) / "runs" / config.name).iterdir())[-1]
    assert Run.load(run).status == "finished"
    checkpoint = sorted((run / "checkpoints").glob("step_*"))[-1]
    rows: list[dict[str, float]] = json.loads((checkpoint / "progress.json").read_text())["history"]
    return rows


def give_orders(log: Path, file: Path, orders: list[str], over: threading.Event) -> None:
    """The next order each time that the workers were started, after the first one ends an epoch."""
    for number, order in enumerate(orders):
        while not over.wait(0.02):
            logs = list(log.glob("*/train.log"))
            text = logs[0].read_text() if logs else ""
            if text.count("goes on from") == number and "epoch 2/" in text:
                file.write_text(order)
                break


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "orders",
    [
        pytest.param(["train 7 1 kill", "train 9 1 stop"], id="in_a_step"),
        pytest.param(["eval 3 0 kill", "write 2 0 kill"], id="in_evaluation_and_checkpoint", marks=pytest.mark.slow),
    ],
)
def test_two_workers_equal_one_process_whatever_happens_to_one(
    cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], orders: list[str]
) -> None:
    # Steps: 5 an epoch, a checkpoint every 3; uneven parts, since 60 sequences make batches of 13 and 8.
    model = {"type": "broken_models:Struck", "order": str(tmp_path / "order")}
    train = {"epochs": 40, "patience": 40, "batch_size": 13, "max_failures": 8, "hang_timeout_s": 20}
    alone = shop_config(tmp_path, train=train, loss={"type": "bce"}, model=model)
    two = alone.override({"name": "two", "train.num_workers": 2})
    expected = fit(alone)
    over = threading.Event()
    runs = Path(two.output) / "runs" / "two"
    giver = threading.Thread(target=give_orders, args=(runs, tmp_path / "order", orders, over))
    capsys.readouterr()
    giver.start()
    try:
        bundle = fit(two)
    finally:
        over.set()
        giver.join()
    printed = capsys.readouterr().out
    print(printed)
    assert not (tmp_path / "order").exists(), "a blow did not come"
    assert printed.count("goes on from checkpoint") >= len(orders)
    hung = "no headway for 20 s (train.hang_timeout_s): worker 1 does not answer, last seen in " in printed
    assert hung == any("stop" in order for order in orders)
    assert bundle.metrics["restarts"] >= len(orders)
    metrics = bundle.metrics
    assert f"taken up again: {metrics['restarts']}; steps made in vain: {metrics['wasted_steps']}" in printed
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
