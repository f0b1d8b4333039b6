"""A disk that is full while a run writes checkpoints: the run goes on, tells, and needs room only at its end."""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from shop_log import shop_config

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.folder import Folder
from train.checkpoint_writer import CheckpointError
from train.fit import Trial, fit
from train.prepare import ensure_store
from train.run_log import LOG_FILE, RunLog

SIZE = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; skips where none may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [str(mount), "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if mount else None
    if done is None or done.returncode:
        pytest.skip(f"no small file system to be had here: {done.stderr.strip() if done else 'no mount'}")
    yield folder
    subprocess.run([str(shutil.which("umount")), "-l", str(folder)], check=True)


class Ballast:
    """Fills the disk after one validation and gives the room back after another."""

    def __init__(self, disk: Path, fill: int, free: int) -> None:
        self._file, self._fill, self._free, self._seen = disk / "ballast", fill, free, 0

    def __call__(self, metrics: Mapping[str, float]) -> None:
        self._seen += 1
        if self._seen == self._fill:
            with contextlib.suppress(OSError), self._file.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        if self._seen == self._free:
            self._file.unlink()


def config_on(disk: Path, folder: Path) -> Config:
    config = shop_config(folder, train={"epochs": 8}).override(
        {"output": str(disk), "data.store": str(folder / "store")}
    )
    ensure_store(config)
    return config


def assert_as_if_nothing_had_been(config: Config, bundle: Bundle, folder: Path) -> None:
    unbroken = fit(config.override({"output": str(folder / "unbroken")}))
    left, right = (load_file(one.folder / "model.safetensors") for one in (unbroken, bundle))
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_disk_that_is_full_for_a_while(disk: Path, tmp_path: Path) -> None:
    config = config_on(disk, tmp_path)
    bundle = fit(config, trial=Trial("t1", Folder.at(disk / "search"), Ballast(disk, fill=2, free=5)))
    log = (disk / "search" / "trials" / "t1" / LOG_FILE).read_text()
    assert "not written, training goes on: " in log
    assert "No space left on device" in log
    assert_as_if_nothing_had_been(config, bundle, tmp_path)


def test_a_disk_that_stays_full(disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.checkpoint_writer.SECONDS_BETWEEN_TRIES", 0.0)
    config, search = config_on(disk, tmp_path), Folder.at(disk / "search")
    with pytest.raises(CheckpointError, match="Make room"):
        fit(config, trial=Trial("t1", search, Ballast(disk, fill=2, free=99)))
    (disk / "ballast").unlink()
    bundle = fit(config, trial=Trial("t1", search))
    assert "goes on from checkpoint" in (disk / "search" / "trials" / "t1" / LOG_FILE).read_text()
    assert_as_if_nothing_had_been(config, bundle, tmp_path)


def test_lines_that_found_no_room_come_with_a_later_one(disk: Path) -> None:
    log = RunLog(Folder.at(disk), echo=False)
    log.say("one")
    ballast = Ballast(disk, fill=1, free=2)
    ballast({})
    for number in range(3000):
        log.say(f"line {number}")
    ballast({})
    log.say("last")
    lines = (disk / LOG_FILE).read_text().splitlines()
    assert lines == ["one", *(f"line {number}" for number in range(3000)), "last"]
