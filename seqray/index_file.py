"""A retrieval index of a bundle, built once on a node and kept in its cache with the last few others."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from seqray.approximate import ApproximateRetrieval, build_index, recall
from seqray.bundle import Bundle
from seqray.errors import BundleError, DataError
from seqray.histories import HistoryReader
from seqray.models.protocol import Prediction, SequentialModel, predict
from seqray.query import Query
from seqray.retrieval import ExactRetrieval, Limits
from seqray.serve_config import RetrievalConfig

QUERIES, EVENTS, BEST = 200, 10, 20
"""Recall is measured on so many made-up histories of so many popular items, over the exact BEST."""

KEPT = 6
"""Indexes of a folder: of champion, challenger and the ways back, in more than one setting. Another is built anew."""

log = logging.getLogger(__name__)


def open_retrieval(
    bundle: Bundle,
    model: SequentialModel,
    reader: HistoryReader,
    weights_VD: Tensor,
    exact: ExactRetrieval,
    config: RetrievalConfig,
    folder: Path,
) -> ApproximateRetrieval:
    """The index that the node's cache holds for these weights and settings, else a new one, for which old ones go.

    A new one is compared with the exact search, and its recall logged; BundleError when that is below
    `config.min_recall`. DataError when the folder cannot be written.
    """
    import faiss

    path = folder / f"{_key(bundle, config)}.faiss"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock_of(path).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several replicas of a node one builds it
            if path.exists():
                os.utime(path)
                return ApproximateRetrieval(faiss.read_index(str(path)), weights_VD, config, exact)
            began = time.monotonic()
            index = build_index(weights_VD, config)
            retrieval = ApproximateRetrieval(index, weights_VD, config, exact)
            share = recall(retrieval, exact, *_questions(bundle, model, reader, weights_VD))
            log.warning(
                "%s index of %s items built in %.0f s: it finds %.1f %% of the exact %d best",
                config.type, f"{bundle.num_items:,}", time.monotonic() - began, 100 * share, BEST,
            )  # fmt: skip
            if share < config.min_recall:
                raise BundleError(
                    f"serve.retrieval: the {config.type} index finds {share:.3f} of the exact {BEST} best, less than "
                    f"min_recall {config.min_recall:g}; raise effort, probes or candidates, or take type exact"
                )
            _write(index, path)
            _delete_unused(folder, path)
    except OSError as error:
        raise DataError(f"{folder}: cannot hold an index: {error}; set cluster.cache_folder") from error
    return retrieval


def _key(bundle: Bundle, config: RetrievalConfig) -> str:
    # How it is searched is in it too: another recall has to be measured, and may be too low.
    return hashlib.sha256(
        json.dumps([config.model_dump(), bundle.manifest["files"]], sort_keys=True).encode()
    ).hexdigest()[:24]


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.lock")


def _delete_unused(folder: Path, newest: Path) -> None:
    """Deletes all but the last KEPT that were used, and what killed processes left half written.

    Who reads or writes an index holds its lock: that one stays, and so does what cannot be deleted. The empty lock
    files stay too, since another process may be about to take one.
    """
    used = {}
    for path in folder.glob("*.faiss"):
        with contextlib.suppress(FileNotFoundError):  # another process deletes too
            used[path] = path.stat().st_mtime
    old = sorted(used.keys() - {newest}, key=used.__getitem__, reverse=True)[KEPT - 1 :]
    _delete_unlocked({path: path for path in old})
    halves = {path: path.with_name(path.stem.removeprefix(".")) for path in folder.glob(".*.faiss.*")}
    _delete_unlocked({path: index for path, index in halves.items() if index != newest})


def _delete_unlocked(index_of: dict[Path, Path]) -> None:
    for path, index in index_of.items():
        with contextlib.suppress(OSError), _lock_of(index).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)


def _write(index: Any, path: Path) -> None:
    import faiss

    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        faiss.write_index(index, str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _questions(
    bundle: Bundle, model: SequentialModel, reader: HistoryReader, weights_VD: Tensor
) -> tuple[Prediction, list[Limits]]:
    """What the model says after histories drawn by popularity."""
    events = bundle.items.column("train_events").to_numpy().astype(np.float64) + 1
    rows = np.random.default_rng(0).choice(len(events), (QUERIES, EVENTS), p=events / events.sum())
    ids = bundle.items.column("item_id")
    histories = [reader.read(Query(tuple(ids.take(row).to_pylist()))) for row in rows]
    return predict(model, reader.batch(histories), weights_VD), [Limits(BEST, ())] * QUERIES
