"""Events of a store that is larger than a node's disk: files of whole users, fetched when they are asked for.

The folder of such a store holds all but the events; those lie beside it in `<store>.events`, one Arrow file for each
shard, named after its content, so that a file never changes.
"""

import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.fs as pafs

from seqray.cache import Cache
from seqray.errors import DataError
from seqray.locations import is_uri
from seqray.storage import file_sha256, open_filesystem

SHARDS_FILE = "shards.json"
LANES = 16
"""Shards that a global batch is drawn from; a step of `train` reads these at a time, over all workers."""

IntArray = npt.NDArray[np.int64]
Kind = TypeVar("Kind", bound=np.generic)


@dataclass(frozen=True)
class Shard:
    """One file of events."""

    users: int
    events: int
    bytes: int
    sha256: str

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.sha256[:32]}.arrow"


def events_location(store: str) -> str:
    """Where the shards of the store at a path or URI lie."""
    place, mark, options = store.partition("?") if is_uri(store) else (store, "", "")
    return f"{place.rstrip('/')}.events{mark}{options}"


def read_shards(folder: Path) -> list[Shard]:
    """The shards of the store in a folder; none when its events are in one file."""
    path = folder / SHARDS_FILE
    return [Shard(**shard) for shard in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def write_shards(folder: Path, shards: Sequence[Shard]) -> None:
    """Lists them in a store's folder."""
    text = json.dumps([asdict(shard) for shard in shards], indent=1)
    (folder / SHARDS_FILE).write_text(text + "\n", encoding="utf-8")


class EventShards:
    """The shards of one store, as columns that are indexed by positions in the whole log.

    A local shard is read where it lies. A remote one is copied to the node's cache, checked, and shared by the node's
    processes; the least recently used ones go when the copies reach `cache.shard_bytes`. A process lets go of a file
    that went at the next shard it opens, so that the disk holds little more than that.
    """

    def __init__(self, store: str, shards: Sequence[Shard], cache: Cache) -> None:
        self.bounds: IntArray = np.cumsum([0, *(shard.events for shard in shards)])
        self._shards, self._location, self._cache = shards, events_location(store), cache
        self._remote = is_uri(store)
        largest = max(shard.bytes for shard in shards)
        held, lanes = int(cache.shard_bytes // largest), min(LANES, len(shards))
        if self._remote and held < lanes:
            raise DataError(
                f"{store}: cluster.cache_shards_gib holds {held} of its shards ({largest / 2**30:.3g} GiB), and "
                f"training reads {lanes} at a time; raise it, or data.store_shards for smaller ones"
            )
        self._mapped: dict[int, tuple[Path, Any]] = {}

    def batch(self, number: int) -> Any:
        """The record batch of a shard, memory-mapped."""
        if number not in self._mapped:
            self._mapped = {key: (path, batch) for key, (path, batch) in self._mapped.items() if path.exists()}
            self._mapped[number] = self._open(number)
        return self._mapped[number][1]

    def _open(self, number: int, tries: int = 3) -> tuple[Path, Any]:
        path = self._path(number)
        try:
            return path, pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, pa.ArrowInvalid) as error:
            if self._remote and tries > 1 and not path.exists():  # another process made room with it just now
                return self._open(number, tries - 1)
            raise DataError(f"{path}: cannot be read: {error}") from error

    def _path(self, number: int) -> Path:
        shard = self._shards[number]
        if not self._remote:
            return Path(self._location) / shard.name
        filesystem, remote = self._opened
        folder = self._cache.folder / f"shards-{hashlib.sha256(self._location.encode()).hexdigest()[:16]}"
        path = folder / shard.name
        with _locked(folder, shard.name):
            if path.exists():
                os.utime(path)
                return path
            with _locked(folder, "room"):
                self._make_room(folder, shard.bytes)
            temporary = folder / f".{shard.name}.{uuid.uuid4().hex[:8]}"
            try:
                pafs.copy_files(f"{remote}/{shard.name}", str(temporary), filesystem, pafs.LocalFileSystem())
                if file_sha256(temporary) != shard.sha256:
                    raise DataError(f"{self._location}: {shard.name} does not match {SHARDS_FILE}")
                os.replace(temporary, path)
            except (OSError, pa.ArrowException) as error:
                raise DataError(f"{self._location}: {shard.name} cannot be copied to {folder}: {error}") from error
            finally:
                temporary.unlink(missing_ok=True)
        return path

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return open_filesystem(self._location)

    def _make_room(self, folder: Path, wanted: int) -> None:
        files = sorted(((file.stat().st_mtime, file) for file in folder.glob("*.arrow")), key=lambda pair: pair[0])
        held = sum(file.stat().st_size for _, file in files)
        for _, file in files:
            if held + wanted <= self._cache.shard_bytes:
                return
            held -= file.stat().st_size
            file.unlink()  # who has it mapped goes on reading it


class ShardColumn(Generic[Kind]):
    """One column over all shards: `column[positions]` is what an array with all events would give."""

    def __init__(self, shards: EventShards, name: str, kind: type[Kind]) -> None:
        self._shards, self._name, self.dtype = shards, name, np.dtype(kind)

    def __len__(self) -> int:
        return int(self._shards.bounds[-1])

    def __getitem__(self, places: IntArray) -> npt.NDArray[Kind]:
        bounds = self._shards.bounds
        number = np.searchsorted(bounds, places, side="right") - 1
        values = np.empty(len(places), self.dtype)
        for shard in np.unique(number):
            mine = number == shard
            values[mine] = self._shards.batch(int(shard)).column(self._name).to_numpy()[places[mine] - bounds[shard]]
        return values


def lane_order(samples: IntArray, random: np.random.Generator) -> IntArray:
    """A permutation of all samples for one epoch; samples: how many each shard has, one after the other.

    The shards are shuffled and dealt to LANES lanes, and within a shard the samples are shuffled. The order takes a
    sample from each lane in turn, so that LANES shards are open at a time, and worker `rank` of `world`, which takes
    every world-th sample, reads the same lanes all the time where `world` divides LANES or LANES divides `world`.
    """
    first = np.cumsum(samples) - samples
    dealt = random.permutation(len(samples))
    lanes = [
        np.concatenate([first[shard] + random.permutation(samples[shard]) for shard in dealt[lane::LANES]])
        for lane in range(min(LANES, len(samples)))
    ]
    place = np.concatenate([np.arange(len(lane)) for lane in lanes])
    return np.concatenate(lanes)[np.argsort(place, kind="stable")]


@contextmanager
def _locked(folder: Path, name: str) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish_shards(written: Path, store: str) -> None:
    """Puts the files that were written for the shards of a store where they belong.

    Those of an older content stay, for the runs that may still read them. DataError when it cannot be written.
    """
    filesystem, path = open_filesystem(events_location(store))
    try:
        filesystem.create_dir(path, recursive=True)
        for file in sorted(written.glob("*.arrow")):
            if is_uri(store):
                pafs.copy_files(str(file), f"{path}/{file.name}", pafs.LocalFileSystem(), filesystem)
            else:
                os.replace(file, Path(path) / file.name)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{events_location(store)}: cannot be written: {error}") from error
