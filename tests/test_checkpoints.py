"""Checkpoints in a folder, local or remote: which stay, which are passed over, and storage that fails."""

import threading
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import pytest
import torch

from train.checkpoint_writer import CheckpointError, CheckpointWriter
from train.checkpoints import Checkpoints, LocalFolder, RemoteFolder
from train.state import Progress, Snapshot


def snapshot(step: int, *, best: bool = False, done: bool = False) -> Snapshot:
    """A state of two weights; the best one was seen at step 1 or is this one."""
    model = {"weight": torch.full((3,), float(step))}
    progress = Progress(global_step=step, best_epoch=0, best_value=0.5, done=done, history=[{"epoch": 1.0}])
    return Snapshot(
        model, {"0.step": torch.tensor(float(step))}, model if best else {"weight": torch.ones(3)}, progress
    )


def write(checkpoints: Checkpoints, *snapshots: Snapshot) -> None:
    for one in snapshots:
        checkpoints.publish(*checkpoints.prepare(one))


@pytest.fixture(params=["local", "remote"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> LocalFolder | RemoteFolder:
    """tmp_path / "ck", as a local folder or as a filesystem that is not known to be local."""
    if request.param == "local":
        return LocalFolder(tmp_path / "ck")
    return RemoteFolder(pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem()), "ck")


def test_what_is_read_is_what_was_written(folder: LocalFolder | RemoteFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    write(checkpoints, snapshot(3), snapshot(4, best=True))
    found, name, passed_over = checkpoints.newest()
    assert found is not None
    assert (name, passed_over) == ("step_000000004_best", [])
    assert found.progress == snapshot(4).progress
    assert torch.equal(found.best["weight"], torch.full((3,), 4.0))
    assert found.is_best
    before = checkpoints.read("step_000000003")
    assert torch.equal(before.best["weight"], torch.ones(3))
    assert torch.equal(before.optimizer["0.step"], torch.tensor(3.0))
    assert not before.is_best


def test_the_last_ones_and_the_best_stay(folder: LocalFolder | RemoteFolder) -> None:
    checkpoints = Checkpoints(folder, keep=2)
    write(checkpoints, snapshot(1, best=True), snapshot(2, best=True), *(snapshot(step) for step in (3, 4, 5)))
    assert checkpoints.names() == ["step_000000005", "step_000000004", "step_000000002_best"]
    write(checkpoints, snapshot(6), snapshot(6, done=True))
    assert checkpoints.names() == ["step_000000006_end", "step_000000006", "step_000000002_best"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "missing", "half_uploaded", "empty"])
def test_a_damaged_one_is_named_and_the_one_before_is_taken(
    folder: LocalFolder | RemoteFolder, tmp_path: Path, damage: str
) -> None:
    checkpoints = Checkpoints(folder, keep=3)
    write(checkpoints, snapshot(1), snapshot(2))
    newest = tmp_path / "ck" / "step_000000002"
    file = newest / "optimizer.safetensors"
    content = file.read_bytes()
    named = file.name
    if damage == "torn":
        file.write_bytes(content[:-8])
    elif damage == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "missing":
        file.unlink()
    else:
        named = "manifest.json"
        for path in newest.iterdir():
            if damage == "empty" or path.name == named:
                path.unlink()
    found, name, passed_over = checkpoints.newest()
    assert (found is not None, name) == (True, "step_000000001")
    assert len(passed_over) == 1
    assert passed_over[0].startswith("step_000000002: ")
    assert named in passed_over[0]
    # The run comes to the same step again, and writes over what is damaged.
    write(checkpoints, snapshot(2))
    assert checkpoints.newest()[1:] == ("step_000000002", [])


def test_no_checkpoint_at_all(folder: LocalFolder | RemoteFolder) -> None:
    assert Checkpoints(folder, keep=1).newest() == (None, None, [])


class FailingStorage(pafs.FileSystemHandler):  # type: ignore[misc]
    """A filesystem in a local folder that takes no files while `away`."""

    def __init__(self, folder: Path) -> None:
        self.away = False
        self._inner = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        if self.away:
            raise OSError(f"{path}: the storage is away")
        return self._inner.open_output_stream(path, metadata=metadata)

    def get_type_name(self) -> str:
        return "failing"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._inner.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._inner.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._inner.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._inner.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self._inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._inner.delete_file(path)

    def move(self, source: str, target: str) -> None:
        self._inner.move(source, target)

    def copy_file(self, source: str, target: str) -> None:
        self._inner.copy_file(source, target)

    def open_input_stream(self, path: str) -> Any:
        return self._inner.open_input_stream(path)

    def open_input_file(self, path: str) -> Any:
        return self._inner.open_input_file(path)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError


def test_storage_that_fails_is_told_and_tried_again(tmp_path: Path) -> None:
    storage, told = FailingStorage(tmp_path), list[str]()
    checkpoints = Checkpoints(RemoteFolder(pafs.PyFileSystem(storage), "ck"), keep=2)
    writer = CheckpointWriter(checkpoints, lambda: None, told.append)
    writer.write(snapshot(1))
    writer.finish()
    storage.away = True
    writer.write(snapshot(2))
    while not told:
        writer.poll()
    assert told[0].startswith("checkpoint step_000000002 not written")
    assert "the storage is away" in told[0]
    storage.away = False
    writer.write(snapshot(4))
    writer.finish()
    assert len(told) == 1
    assert checkpoints.newest()[1:] == ("step_000000004", [])
    writer.close()


def test_only_the_last_one_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.checkpoint_writer.SECONDS_BETWEEN_TRIES", 0.0)
    storage, told = FailingStorage(tmp_path), list[str]()
    storage.away = True
    checkpoints = Checkpoints(RemoteFolder(pafs.PyFileSystem(storage), "ck"), keep=2)
    writer = CheckpointWriter(checkpoints, lambda: None, told.append)
    writer.write(snapshot(9, done=True))
    with pytest.raises(CheckpointError, match="the same command"):
        writer.finish()
    assert len(told) == 3
    storage.away = False
    writer.write(snapshot(9, done=True))
    writer.finish()
    writer.close()


class Stale(Exception):
    pass


def test_a_worker_that_was_replaced_writes_nothing(tmp_path: Path) -> None:
    def check() -> None:
        raise Stale

    checkpoints = Checkpoints.at(tmp_path / "ck", keep=2)
    writer = CheckpointWriter(checkpoints, check, print)
    writer.write(snapshot(1))
    with pytest.raises(Stale):
        writer.finish()
    writer.close()
    assert checkpoints.names() == []


def test_training_waits_for_one_write_at_the_most(tmp_path: Path) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def check() -> None:
        begun.set()
        go_on.wait(60)

    checkpoints = Checkpoints.at(tmp_path / "ck", keep=9)
    writer = CheckpointWriter(checkpoints, check, print)
    writer.write(snapshot(1))  # returns while the storage is busy
    begun.wait(60)
    writer.poll()
    assert checkpoints.names() == []
    second = threading.Thread(target=writer.write, args=(snapshot(2),))
    second.start()
    second.join(0.3)
    assert second.is_alive()  # back-pressure: at most one copy of the state is kept
    go_on.set()
    second.join(60)
    writer.finish()
    writer.close()
    assert checkpoints.names() == ["step_000000002", "step_000000001"]
