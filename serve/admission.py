"""Admission: what a bundle has to pass before it may answer, when it is promoted and again in each replica."""

import contextlib
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from seqray.bundle import ITEMS_FILE, Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import BundleError
from seqray.folder import Folder
from seqray.serve_config import ServeConfig
from seqray.storage import MANIFEST_FILE, file_sha256

MB = 1_000_000


@dataclass(frozen=True)
class Admission:
    """The limits, and whose code may run."""

    trusted: tuple[str, ...] = ()
    max_bundle_mb: float | None = None
    max_items: int | None = None
    cache: Cache | None = None

    @classmethod
    def of(cls, config: Config) -> "Admission":
        """That of a config."""
        serve = config.serve
        return cls(config.component_types, serve.max_bundle_mb, serve.max_items, Cache.of(config.cluster))

    @classmethod
    def by_default(cls) -> "Admission":
        """The limits of a config that says nothing of them."""
        serve = ServeConfig()
        return cls((), serve.max_bundle_mb, serve.max_items)

    def num_bytes(self, location: str) -> int:
        """The size of a bundle; BundleError when it is too large."""
        size = Folder.at(location).num_bytes()
        if self.max_bundle_mb is not None and size > self.max_bundle_mb * MB:
            raise BundleError(
                f"{location}: the bundle has {size / MB:,.1f} MB, more than serve.max_bundle_mb {self.max_bundle_mb:g}"
            )
        return size

    def load(self, location: str, manifest_sha256: str | None = None) -> Bundle:
        """The verified bundle at a path or URI, refused before it is read when it is too large.

        manifest_sha256: what its manifest has to be. BundleError, or DataError when it cannot be fetched.
        """
        self.num_bytes(location)
        folder = (self.cache or Cache()).fetch(location)
        if self.max_items is not None:
            with contextlib.suppress(OSError, pa.ArrowException):  # Bundle.load says it better
                num_items = pq.read_metadata(folder / ITEMS_FILE).num_rows
                if num_items > self.max_items:
                    raise BundleError(f"{location}: {num_items:,} items, more than serve.max_items {self.max_items:,}")
        bundle = Bundle.load(location, self.trusted, self.cache)
        if manifest_sha256 is not None and file_sha256(bundle.folder / MANIFEST_FILE) != manifest_sha256:
            raise BundleError(f"{location}: {MANIFEST_FILE} is not the one that was registered")
        return bundle
