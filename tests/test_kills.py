"""A run that is killed, anywhere, and started again on as many workers equals an unbroken one to the last bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from shop_log import shop_config, write_log
from struck import Blow, job_of, killed, progress_in, run_workers

from seqray.bundle import Bundle
from seqray.config import Config
from train.fit import fit
from train.job import Job

STEPS = 16
"""Of a run: 4 an epoch, 4 epochs; a checkpoint every 3 and after each best validation."""


def config_in(folder: Path) -> Config:
    return shop_config(folder, model={"dropout": 0.3}, loss={"type": "bce"})


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return fit(config_in(tmp_path_factory.mktemp("unbroken")))


def assert_goes_on_as_if_nothing_had_been(folder: Path, blow: Blow, unbroken: Bundle) -> None:
    write_log(folder)
    config = config_in(folder)
    killed(config.plain(), blow)
    bundle = fit(config)
    assert bundle.folder.name == next((folder / "out" / "runs" / "shop").iterdir()).name
    left, right = (load_file(one.folder / "model.safetensors") for one in (unbroken, bundle))
    assert left.keys() == right.keys()
    assert all((left[name] == right[name]).all() for name in left)
    differ = {key for key, value in unbroken.metrics.items() if bundle.metrics[key] != value}
    assert differ <= {"train_seconds", "restarts", "wasted_steps"}
    assert bundle.metrics["restarts"] == 1


@pytest.mark.parametrize(
    "blow",
    [
        Blow("step", count=1),  # before there is a checkpoint
        Blow("step", count=7),  # within an epoch
        Blow("step", count=STEPS),
        Blow("evaluation", count=8),
        Blow("open", "step_000000006.new/progress.json"),  # a checkpoint is half written
        Blow("os.rename", "step_000000006.new"),  # it is written, but has no name yet
        Blow("shutil.rmtree", "/step_0", count=2),  # an old one is half deleted
        Blow("os.rename", "bundles/shop"),
    ],
    ids=str,
)
def test_killed_and_started_again(tmp_path: Path, unbroken: Bundle, blow: Blow) -> None:
    assert_goes_on_as_if_nothing_had_been(tmp_path, blow, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, STEPS + 1))
def test_killed_at_any_step(tmp_path: Path, unbroken: Bundle, count: int) -> None:
    assert_goes_on_as_if_nothing_had_been(tmp_path, Blow("step", count=count), unbroken)


def killed_with(world: int, folder: Path, dropout: float) -> tuple[Job, Config]:
    """A run on so many workers, the second of which is killed in step 6."""
    model = {"type": "broken_models:Struck", "order": str(folder / "order"), "dropout": dropout}
    config = shop_config(folder, model=model, train={"epochs": 3, "checkpoint_steps": 2})
    job = job_of(config, folder)
    (folder / "order").write_text("train 7 1 kill")  # the first call is Parallel.warm_up
    results = run_workers(job.plain(), world, folder)
    assert results[1] == "exit -9"
    assert None not in results
    return job, config


def test_three_workers_go_on_to_the_last_bit(tmp_path: Path) -> None:
    job, config = killed_with(3, tmp_path, dropout=0.3)
    assert run_workers(job.plain(), 3, tmp_path) == [None] * 3
    unbroken = job_of(config.override({"name": "unbroken"}), tmp_path)
    assert run_workers(unbroken.plain(), 3, tmp_path) == [None] * 3
    left, right = (load_file(Path(one.bundle) / "model.safetensors") for one in (unbroken, job))
    assert all((left[name] == right[name]).all() for name in left)


@pytest.mark.parametrize("world", [1, 3])
def test_another_number_of_workers_goes_on_with_the_same_data(tmp_path: Path, world: int) -> None:
    job, config = killed_with(2, tmp_path, dropout=0.0)  # dropout masks depend on the number of workers
    assert run_workers(job.plain(), world, tmp_path) == [None] * world
    unbroken = job_of(config.override({"name": "unbroken"}), tmp_path)
    assert run_workers(unbroken.plain(), 2, tmp_path) == [None] * 2
    broken, whole = (progress_in(Path(one.run_folder))["history"] for one in (job, unbroken))
    for left, right in zip(broken, whole, strict=True):
        assert left["step"] == right["step"]
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-4)
