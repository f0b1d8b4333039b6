"""Checkpoints: snapshots of a run's state in a folder, on a local disk or behind any pyarrow.fs URI.

Each is a folder of its own, `step_N`, with safetensors, JSON and the manifest with the sha256 of each file: no
pickle. It is there as a whole or is passed over: a local one gets its name by a rename, of a remote one the manifest
comes last.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import pyarrow.fs as pafs
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from seqray.errors import BundleError, DataError
from seqray.manifest import verify_manifest, write_manifest
from seqray.storage import MANIFEST_FILE, download, open_filesystem, upload
from train.state import Progress, Snapshot

PROGRESS_FILE = "progress.json"
WRITE_ERRORS = (OSError, SafetensorError, DataError)
"""What storage that is full, slow or away raises."""


class Folder(Protocol):
    """Where checkpoints lie."""

    def names(self) -> list[str]:
        """Of all checkpoints, whole or not."""

    def new(self, name: str) -> Path:
        """An empty local folder to write `name` in; what a killed or failed writer left behind is gone."""

    def publish(self, written: Path, name: str) -> None:
        """Makes the folder that `new` gave the checkpoint `name`."""

    def remove(self, name: str) -> None:
        """Deletes a checkpoint."""

    def local(self, name: str) -> AbstractContextManager[Path]:
        """A local folder with the checkpoint, as it is or as a copy that is deleted afterwards."""


class LocalFolder:
    """Checkpoints on a disk that this process sees."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        """Of all checkpoints."""
        return [path.name for path in self._folder.glob("step_*")]

    def new(self, name: str) -> Path:
        """Beside the checkpoints."""
        self._folder.mkdir(parents=True, exist_ok=True)
        for left in self._folder.glob(".step_*"):
            shutil.rmtree(left, ignore_errors=True)
        temporary = self._folder / f".{name}.new"
        temporary.mkdir()
        return temporary

    def publish(self, written: Path, name: str) -> None:
        """By a rename, after everything has reached the disk."""
        for path in (*written.iterdir(), written):
            _flush(path)
        target, replaced = self._folder / name, self._folder / f".{name}.old"
        if target.exists():  # one that was passed over as damaged
            os.replace(target, replaced)
        os.replace(written, target)
        _flush(self._folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Deletes a checkpoint."""
        shutil.rmtree(self._folder / name, ignore_errors=True)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """The very folder."""
        yield self._folder / name


class RemoteFolder:
    """Checkpoints on a pyarrow filesystem."""

    def __init__(self, filesystem: Any, path: str) -> None:
        self._filesystem, self._path = filesystem, path

    def names(self) -> list[str]:
        """Of all checkpoints."""
        selector = pafs.FileSelector(self._path, allow_not_found=True)
        names = [PurePosixPath(info.path).name for info in self._filesystem.get_file_info(selector)]
        return [name for name in names if name.startswith("step_")]

    def new(self, name: str) -> Path:
        """In the system's folder of temporary files."""
        return Path(tempfile.mkdtemp(prefix=f"seqray-{name}-"))

    def publish(self, written: Path, name: str) -> None:
        """Uploads it, manifest last, over what a writer that was killed left half done."""
        path = f"{self._path}/{name}"
        left = self._filesystem.get_file_info(f"{path}/{MANIFEST_FILE}").type == pafs.FileType.NotFound
        if left and self._filesystem.get_file_info(path).type == pafs.FileType.Directory:
            self._filesystem.delete_dir_contents(path)
        upload(written, self._filesystem, path)
        shutil.rmtree(written)

    def remove(self, name: str) -> None:
        """The manifest first, so that it never looks whole."""
        path = f"{self._path}/{name}"
        if self._filesystem.get_file_info(f"{path}/{MANIFEST_FILE}").type == pafs.FileType.File:
            self._filesystem.delete_file(f"{path}/{MANIFEST_FILE}")
        self._filesystem.delete_dir(path)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A copy."""
        with tempfile.TemporaryDirectory(prefix="seqray-") as cache:
            yield download(self._filesystem, f"{self._path}/{name}", Path(cache))


class Checkpoints:
    """The checkpoints of one run; the newest `keep` stay, and the best one."""

    def __init__(self, folder: Folder, keep: int) -> None:
        self._folder, self._keep = folder, keep

    @classmethod
    def at(cls, location: str | Path, keep: int) -> "Checkpoints":
        """Those in a local folder or at a URI."""
        filesystem, path = open_filesystem(location)
        local = isinstance(filesystem, pafs.LocalFileSystem)
        return cls(LocalFolder(Path(path)) if local else RemoteFolder(filesystem, path), keep)

    def names(self) -> list[str]:
        """Newest first."""
        return sorted(self._folder.names(), reverse=True)

    def prepare(self, snapshot: Snapshot) -> tuple[Path, str]:
        """(local folder with the snapshot, name), for `publish`; an error of WRITE_ERRORS leaves nothing behind."""
        name = checkpoint_name(snapshot)
        folder = self._folder.new(name)
        try:
            _save(snapshot, folder)
        except WRITE_ERRORS:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder, name

    def publish(self, prepared: Path, name: str) -> None:
        """Makes it a checkpoint and deletes those that are no longer kept."""
        try:
            self._folder.publish(prepared, name)
        except WRITE_ERRORS:
            shutil.rmtree(prepared, ignore_errors=True)
            raise
        names = self.names()
        best = next((name for name in names if name.endswith("_best")), None)
        for old in names[self._keep :]:
            if old != best:
                with suppress(*WRITE_ERRORS):  # it goes with the next one
                    self._folder.remove(old)

    def read(self, name: str) -> Snapshot:
        """BundleError that names what is torn, changed or missing."""
        with self._folder.local(name) as folder:
            verify_manifest(folder, BundleError)
            numbers = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            model, optimizer = (load_file(folder / f"{part}.safetensors") for part in ("model", "optimizer"))
            best_file = folder / "best.safetensors"
            best = load_file(best_file) if best_file.exists() else model
            progress = Progress.of_plain(numbers)
            return Snapshot(model, optimizer, best if progress.best_epoch >= 0 else {}, progress)

    def newest(self) -> tuple[Snapshot | None, str | None, list[str]]:
        """(snapshot, its name, reasons why newer ones were passed over); None when no whole one is there."""
        reasons: list[str] = []
        for name in self.names():
            try:
                return self.read(name), name, reasons
            except (BundleError, DataError, SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                reasons.append(f"{name}: {error}")
        return None, None, reasons


def checkpoint_name(snapshot: Snapshot) -> str:
    """`step_N`, `step_N_best` for the weights of the best validation, `step_N_end` when training is over."""
    suffix = "_end" if snapshot.progress.done else "_best" if snapshot.is_best else ""
    return f"step_{snapshot.progress.global_step:09d}{suffix}"


def _save(snapshot: Snapshot, folder: Path) -> None:
    parts = {"model": snapshot.model, "optimizer": snapshot.optimizer}
    if snapshot.best and not snapshot.is_best:
        parts["best"] = snapshot.best
    for part, tensors in parts.items():
        save_file(tensors, folder / f"{part}.safetensors")
    (folder / PROGRESS_FILE).write_text(json.dumps(snapshot.progress.plain()), encoding="utf-8")
    write_manifest(folder, {}, sorted(path.name for path in folder.iterdir()))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
