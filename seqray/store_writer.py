"""Writing the prepared store that `seqray.sequences.SequenceStore` reads."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from seqray import __version__
from seqray.data_config import DataConfig
from seqray.event_shards import SHARDS_FILE, Shard, write_shards
from seqray.interactions import Interactions
from seqray.item_table import item_table
from seqray.sequences import EVENT_TYPES, FORMAT_VERSION, ITEMS_FILE, SEQUENCES_FILE, SPLIT_COLUMNS, USERS_FILE
from seqray.splits import SplitPositions, iso_time
from seqray.storage import MANIFEST_FILE, file_sha256
from seqray.table_files import find_files

IntArray = npt.NDArray[np.int64]

BAD_ROWS_FILE = "quarantine/bad_rows.parquet"


def store_fingerprint(data: DataConfig, seed: int) -> str:
    """sha256 of what a store is made from: the data config, and name, size and time of every input file.

    The seed counts only where it changes the order of events, and the place of the store not at all.
    """
    files = find_files(data.path, data.format)
    if data.items is not None:
        files += find_files(data.items.path)
    made_from = {
        "format_version": FORMAT_VERSION,
        "data": plain_data_config(data),
        "seed": seed if data.tie_order == "shuffle" else None,
        "files": [(file.name, file.size, file.modified_ns) for file in files],
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def plain_data_config(data: DataConfig) -> dict[str, Any]:
    """The data config as plain data, without the place of the store."""
    return data.model_dump(mode="json", exclude={"store"})


def write_store(
    folder: Path,
    events: Interactions,
    split: SplitPositions,
    data: DataConfig,
    *,
    bad_rows: Any,
    counts: Mapping[str, Any],
    fingerprint: str,
    shards_folder: Path | None = None,
) -> dict[str, Any]:
    """Writes all files of a store to an empty folder and returns its manifest; `counts` are those made before.

    shards_folder: another one for the shards of events, where data.store_shards asks for them.
    """
    if shards_folder is None:
        _write_sequences(folder / SEQUENCES_FILE, events, split)
        files: tuple[str, ...] = (SEQUENCES_FILE, ITEMS_FILE)
    else:
        _write_users(folder / USERS_FILE, events, split)
        write_shards(folder, _shards(shards_folder, events, data.store_shards))
        files = (USERS_FILE, SHARDS_FILE, ITEMS_FILE)
    train_events = _train_events(events, split)
    pq.write_table(item_table(events.item_ids, train_events, data.items), folder / ITEMS_FILE)
    write_bad_rows(folder, bad_rows)
    times = events.timestamps_E
    manifest = {
        "format_version": FORMAT_VERSION,
        "fingerprint": fingerprint,
        "content_sha256": {name: file_sha256(folder / name) for name in files},
        "counts": {
            **counts,
            "users": len(events.user_ids),
            "items": len(events.item_ids),
            "events": len(events),
            "train_events": int(split.train_end.sum()),
            "val_users": int((split.val_end > split.val_start).sum()),
            "test_users": int((split.test_end > split.test_start).sum()),
        },
        "has_timestamps": data.columns.timestamp is not None,
        "time_range": None
        if data.columns.timestamp is None
        else [iso_time(int(times.min())), iso_time(int(times.max()))],
        "data": plain_data_config(data),
        "seqray_version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_manifest(folder, manifest)
    return manifest


def write_bad_rows(folder: Path, bad_rows: Any) -> None:
    """Writes the quarantine into a folder, when there is anything in it."""
    if bad_rows.num_rows:
        path = folder / BAD_ROWS_FILE
        path.parent.mkdir(parents=True)
        pq.write_table(bad_rows, path)


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Writes manifest.json into a folder that is not published yet."""
    text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST_FILE).write_text(text + "\n", encoding="utf-8")


def _write_users(path: Path, events: Interactions, split: SplitPositions) -> None:
    columns = {"user_id": events.user_ids, "offset": pa.array(events.offsets()[:-1]), **_split_columns(split)}
    _write_batch(path, pa.record_batch(columns))


def _shards(folder: Path, events: Interactions, count: int) -> list[Shard]:
    """Writes files of whole users with about equally many events."""
    offsets = events.offsets()
    cuts = np.searchsorted(offsets, np.linspace(0, len(events), count + 1).astype(np.int64))
    shards = []
    for first, last in pairwise(cuts.tolist()):
        if first == last:
            continue
        part = slice(int(offsets[first]), int(offsets[last]))
        columns = {
            "items": pa.array((events.items_E[part] + 1).astype(np.int32)),
            "timestamps": pa.array(events.timestamps_E[part]),
        }
        if events.event_types_E is not None:
            columns[EVENT_TYPES] = pa.array(events.event_types_E[part])
        path = folder / "writing"
        _write_batch(path, pa.record_batch(columns))
        shard = Shard(last - first, part.stop - part.start, path.stat().st_size, file_sha256(path))
        path.rename(folder / shard.name)
        shards.append(shard)
    return shards


def _write_sequences(path: Path, events: Interactions, split: SplitPositions) -> None:
    offsets = pa.array(events.offsets())
    items = pa.array((events.items_E + 1).astype(np.int32))
    columns = {
        "user_id": events.user_ids,
        "items": pa.LargeListArray.from_arrays(offsets, items),
        "timestamps": pa.LargeListArray.from_arrays(offsets, pa.array(events.timestamps_E)),
        **_split_columns(split),
    }
    if events.event_types_E is not None:
        columns[EVENT_TYPES] = pa.LargeListArray.from_arrays(offsets, pa.array(events.event_types_E))
    _write_batch(path, pa.record_batch(columns))


def _split_columns(split: SplitPositions) -> dict[str, Any]:
    return {name: pa.array(asdict(split)[name].astype(np.int32)) for name in SPLIT_COLUMNS}


def _write_batch(path: Path, batch: Any) -> None:
    # One uncompressed batch, so that the file's own bytes are the arrays.
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def _train_events(events: Interactions, split: SplitPositions) -> IntArray:
    position = np.arange(len(events)) - events.offsets()[:-1][events.users_E]
    in_training = position < split.train_end[events.users_E]
    return np.bincount(events.items_E[in_training], minlength=len(events.item_ids))
