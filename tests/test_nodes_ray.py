"""Nodes that die, come and are taken away, under a run on Ray Train's workers."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from shop_log import shop_config

from seqray.bundle import Bundle
from seqray.config import Config
from train.finite import TrainingError
from train.fit import fit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without CPUs, and a node with one; further nodes come and go."""
    import ray
    from ray._common.utils import get_default_ray_temp_dir
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="sr", dir="/tmp")
    Path(get_default_ray_temp_dir()).mkdir(exist_ok=True)  # Cluster writes its address there
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
        patch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
        arguments = {"num_cpus": 0, "temp_dir": folder, "include_dashboard": False, "object_store_memory": 100 * 2**20}
        cluster = Cluster(initialize_head=True, head_node_args=arguments)
        add_node(cluster)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
        ray.shutdown()
        cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def add_node(cluster: Any) -> Any:
    return cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)


class Command(threading.Thread):
    """A command that trains, beside the main thread, which alone can add and remove nodes."""

    def __init__(self, config: Config) -> None:
        super().__init__(daemon=True)
        self._config, self._runs = config, Path(config.output) / "runs" / config.name
        self.bundle: Bundle | None = None
        self.error: TrainingError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.bundle = fit(self._config)
        except TrainingError as error:
            self.error = error

    @property
    def log(self) -> str:
        return "".join(path.read_text() for path in self._runs.glob("*/train.log"))

    def wait_for(self, line: str, count: int = 1) -> None:
        """Until a line of the log that holds `line` has come so often."""
        deadline = time.monotonic() + 300
        while self.log.count(line) < count:
            assert self.is_alive() and time.monotonic() < deadline, f"{line!r} never came:\n{self.log}\n{self.error}"
            time.sleep(0.1)


def slow_config(folder: Path, **train: Any) -> Config:
    """A run whose steps are slow until the file is gone."""
    (folder / "slow").touch()
    model = {"type": "broken_models:Struck", "order": str(folder / "order")}
    train = {"epochs": 100, "patience": 100, "evaluate_every": 2, "checkpoint_steps": 4, "start_timeout_s": 40} | train
    return shop_config(folder, model=model, train=train)


def test_an_elastic_run_shrinks_with_a_node_that_dies_and_grows_with_a_new_one(cluster: Any, tmp_path: Path) -> None:
    second = add_node(cluster)
    config = slow_config(tmp_path, num_workers=[1, 2], resize_interval_s=8)
    command = Command(config)
    command.wait_for("2 workers on cpu")
    command.wait_for("epoch 2/100")
    cluster.remove_node(second, allow_graceful=False)
    command.wait_for("failed: ")
    command.wait_for("1 worker on cpu")
    command.wait_for("goes on from checkpoint")
    third = add_node(cluster)
    command.wait_for("2 workers on cpu", 2)
    command.wait_for("goes on from checkpoint", 2)
    (tmp_path / "slow").unlink()
    command.join(300)
    cluster.remove_node(third, allow_graceful=False)
    assert command.bundle is not None, command.log
    alone = fit(config.override({"name": "alone", "train.num_workers": 0}))
    assert command.bundle.metrics["test/ndcg@10"] == pytest.approx(alone.metrics["test/ndcg@10"], abs=0.02)
    # At the most the steps of one interval between checkpoints are lost with each restart, and one step under way.
    assert command.bundle.metrics["wasted_steps"] <= 5 * command.bundle.metrics["restarts"]


def test_a_cluster_without_room_ends_the_run_which_goes_on_later(cluster: Any, tmp_path: Path) -> None:
    second = add_node(cluster)
    config = slow_config(tmp_path, num_workers=2)
    command = Command(config)
    command.wait_for("epoch 2/100")
    cluster.remove_node(second, allow_graceful=False)
    command.join(300)
    assert command.error is not None
    assert "for 40 s (train.start_timeout_s) the cluster had no room for 2 workers with CPU 1 each" in str(
        command.error
    )
    assert "train.num_workers=[1,2]" in str(command.error)
    third = add_node(cluster)
    (tmp_path / "slow").unlink()
    command = Command(config)
    command.join(300)
    assert command.bundle is not None, command.error
    assert "goes on from checkpoint" in command.log
    cluster.remove_node(third, allow_graceful=False)


def test_a_preemption_notice_writes_a_checkpoint(cluster: Any, tmp_path: Path) -> None:
    from ray._raylet import GcsClient

    second = add_node(cluster)
    config = slow_config(
        tmp_path, num_workers=[1, 2], checkpoint_steps=10_000, evaluate_every=100, resize_interval_s=600
    )
    command = Command(config)
    command.wait_for("2 workers on cpu")
    time.sleep(5)  # some steps, which no checkpoint holds
    deadline = int((time.time() + 15) * 1000)
    accepted, why = GcsClient(address=cluster.address).drain_node(second.node_id, 2, "taken away", deadline)
    assert accepted, why
    command.wait_for("a node is about to be taken away: checkpoint at step ")
    command.wait_for("1 worker on cpu")
    command.wait_for("goes on from checkpoint")
    (tmp_path / "slow").unlink()
    command.join(300)
    assert command.bundle is not None, command.error
    assert command.bundle.metrics["restarts"] >= 1
