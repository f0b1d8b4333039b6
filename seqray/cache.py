"""Cache: a node's own copies of what is published behind URIs, fetched once and shared by all its processes."""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from seqray.errors import DataError
from seqray.locations import is_uri, local_path
from seqray.program_config import ClusterConfig
from seqray.storage import MANIFEST_FILE, download, open_filesystem

DAY = 86_400


def default_folder() -> Path:
    """`seqray` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "seqray"


@dataclass(frozen=True)
class Cache:
    """A folder on a node's own disk. A copy is named after the manifest of what it copies, so it is never stale."""

    folder: Path = field(default_factory=default_folder)
    days: float = 7.0
    """Copies that nobody asked for in so many days go when another one is fetched."""
    shard_bytes: int = 100 << 30
    """What the copies of one sharded store's events may take."""

    @classmethod
    def of(cls, config: ClusterConfig) -> "Cache":
        """The cache that a config asks for."""
        folder = Path(config.cache_folder).expanduser().absolute() if config.cache_folder else default_folder()
        return cls(folder, config.cache_days, int(config.cache_shards_gib * 2**30))

    @property
    def index_folder(self) -> Path:
        """Where indexes of bundles are kept, see `seqray.index_file`; the last few that were used."""
        return self.folder / "indexes"

    def fetch(self, location: str | Path) -> Path:
        """A local folder with what is published at `location`: a local one as it is, a remote one as a copy.

        One process of the node copies and checks the files against their sha256, the others wait for it. What it gives
        back is to be opened at once: a memory-mapped file stays readable even when its copy goes.
        """
        if not is_uri(location):
            return local_path(location)
        filesystem, path = open_filesystem(location)
        with self._lock(str(location)):
            there = {entry.name for entry in self.folder.iterdir()}
            copy = download(filesystem, path, self.folder, verify=True)
            os.utime(copy / MANIFEST_FILE)
            if copy.name not in there:
                self._evict()
        return copy

    @contextmanager
    def _lock(self, location: str) -> Iterator[None]:
        name = hashlib.sha256(location.encode()).hexdigest()[:16]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / f".{name}.lock").open("w")
        except OSError as error:
            raise DataError(f"{self.folder}: cannot hold copies: {error}; set cluster.cache_folder") from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _evict(self) -> None:
        """Deletes what was not used for `days`, and what a killed process left half done a day ago."""
        now = time.time()
        for entry in self.folder.iterdir():
            manifest = entry / MANIFEST_FILE
            if manifest.is_file() and not entry.name.startswith("."):
                unused = now - manifest.stat().st_mtime > self.days * DAY
            else:
                unused = entry.is_dir() and entry.name.startswith(".") and now - entry.stat().st_mtime > DAY
            if unused:
                shutil.rmtree(entry, ignore_errors=True)
