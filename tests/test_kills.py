"""A run in one process that is killed, anywhere, and started again equals an unbroken one to the last bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from shop_log import shop_config, write_log
from struck import Blow, killed

from seqray.bundle import Bundle
from seqray.config import Config
from train.fit import fit

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
    assert differ <= {"train_seconds"}


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
