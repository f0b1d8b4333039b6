"""The prepared store as arrays on disk, and the batches that are gathered from it.

Shapes: U users, E events, B sequences of a batch, T packed tokens (all real events of a batch, one after the other).
"""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from seqray.errors import DataError
from seqray.storage import MANIFEST_FILE
from seqray.vocabulary import ItemVocabulary

FORMAT_VERSION = 1
SEQUENCES_FILE = "sequences.arrow"
ITEMS_FILE = "items.parquet"
SPLIT_COLUMNS = ("train_end", "val_start", "val_end", "test_start", "test_end")

Split = Literal["val", "test"]
IntArray = npt.NDArray[np.int64]


class SequenceStore:
    """Histories of all users, memory-mapped: one row a user, events oldest first.

    `sequences.arrow` is one Arrow IPC record batch: user_id, items large_list<int32>, timestamps large_list<int64>
    (microseconds since 1970; in file order where the log has no times), and the columns of SPLIT_COLUMNS (int32),
    positions in the user's own history: training is history[:train_end], the targets of validation are
    history[val_start:val_end] and its history is history[:val_start]; test likewise. No target: start == end (with a
    temporal split start is then the number of events before the period, or 0 for a user without history).
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / SEQUENCES_FILE
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.folder}: not a prepared store: {error}") from error
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: format_version is {self.manifest.get('format_version')}, not {FORMAT_VERSION}"
            )
        self.user_ids: pa.Array = batch.column("user_id")
        self.offsets: IntArray = batch.column("items").offsets.to_numpy()
        self.items: npt.NDArray[np.int32] = batch.column("items").values.to_numpy()
        self.timestamps: IntArray = batch.column("timestamps").values.to_numpy()
        split = {name: batch.column(name).to_numpy() for name in SPLIT_COLUMNS}
        self.train_end = split["train_end"]
        self._targets = {
            "val": (split["val_start"], split["val_end"]),
            "test": (split["test_start"], split["test_end"]),
        }

    @cached_property
    def items_table(self) -> pa.Table:
        """The item table in index order (row 0 is item_index 1): item_id, train_events, then the user's columns."""
        return pq.read_table(self.folder / ITEMS_FILE)

    @cached_property
    def vocabulary(self) -> ItemVocabulary:
        """The items of the store."""
        return ItemVocabulary(self.items_table.column("item_id"))

    @property
    def num_items(self) -> int:
        """Items, padding not counted."""
        return int(self.manifest["counts"]["items"])

    @property
    def has_timestamps(self) -> bool:
        """Whether the log had times; without them `timestamps` are positions."""
        return bool(self.manifest["has_timestamps"])

    def events_before(self, split: Split) -> tuple[IntArray, IntArray]:
        """Positions (into `items`) and user rows of the events known before the targets of `split`.

        leave_one_out: the training events. temporal: all events before the period of `split`.
        """
        temporal = self.manifest["data"]["split"]["type"] == "temporal"
        known = (self._targets[split][0] if temporal else self.train_end).astype(np.int64)
        return ranges(self.offsets[:-1], known), np.repeat(np.arange(len(known)), known)

    def queries(self, split: Split) -> "Queries":
        """The users that have a target in `split`."""
        start, end = self._targets[split]
        rows = np.flatnonzero(end > start)
        begin = self.offsets[rows]
        return Queries(self, rows, begin, begin + start[rows], begin + end[rows])


@dataclass(frozen=True)
class Queries:
    """Histories and targets to rank, as positions into `store.items`: history [begin, cut), targets [cut, end)."""

    store: SequenceStore
    rows: IntArray
    begin: IntArray
    cut: IntArray
    end: IntArray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def are_baskets(self) -> bool:
        """Whether the targets are the items of a basket, one or several."""
        return bool(self.store.manifest["data"]["split"]["target"] == "next_basket")

    def slice(self, start: int, stop: int) -> "Queries":
        """Queries start to stop."""
        part = slice(start, stop)
        return Queries(self.store, self.rows[part], self.begin[part], self.cut[part], self.end[part])

    def history(self, max_length: int) -> "Batch":
        """The newest `max_length` events of each history."""
        start = np.maximum(self.begin, self.cut - max_length)
        return Batch.gather(self.store.items, start, self.cut - start)

    def seen(self) -> tuple[Tensor, Tensor]:
        """Pairs (query, item_index) of all events in the histories."""
        return self._pairs(self.begin, self.cut)

    def targets(self) -> tuple[Tensor, Tensor]:
        """Pairs (query, item_index) of the targets, each item once a query, in the order of the events."""
        query, item = self._pairs(self.cut, self.end)
        keys = query.numpy() * (self.store.num_items + 1) + item.numpy()
        first = np.sort(np.unique(keys, return_index=True)[1])
        return query[first], item[first]

    def _pairs(self, start: IntArray, stop: IntArray) -> tuple[Tensor, Tensor]:
        lengths = stop - start
        items = self.store.items[ranges(start, lengths)].astype(np.int64)
        return torch.from_numpy(np.repeat(np.arange(len(self)), lengths)), torch.from_numpy(items)


@dataclass(frozen=True)
class Batch:
    """Sequences packed without padding.

    items_T: int64 item_index of each token; lengths_B: tokens of each sequence, all at least 1.
    targets_T: the next item after each token, for training; token_T: the token's place among all tokens of the
    global batch, so that what is drawn for a token does not depend on the number of workers.
    """

    items_T: Tensor
    lengths_B: Tensor
    targets_T: Tensor | None = None
    token_T: Tensor | None = None

    @classmethod
    def gather(cls, items: npt.NDArray[np.int32], start: IntArray, lengths: IntArray) -> "Batch":
        """The runs items[start : start + length] as one batch; an empty run becomes one token of padding."""
        empty = lengths == 0
        tokens = items[ranges(np.where(empty, 0, start), np.maximum(lengths, 1))].astype(np.int64)
        lengths = np.maximum(lengths, 1)
        if empty.any():
            tokens[(np.cumsum(lengths) - lengths)[empty]] = 0
        return cls(torch.from_numpy(tokens), torch.from_numpy(lengths))

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        if device.type == "cpu":
            return self
        parts = (self.items_T, self.lengths_B, self.targets_T, self.token_T)
        return Batch(*(None if p is None else p.pin_memory().to(device, non_blocking=True) for p in parts))  # type: ignore[arg-type]

    def last_token_B(self) -> Tensor:
        """Index into T of each sequence's newest event."""
        return self.lengths_B.cumsum(0) - 1


def ranges(start: IntArray, lengths: IntArray) -> IntArray:
    """The integers start[i] .. start[i] + lengths[i] - 1, one run after the other."""
    shift = start - (np.cumsum(lengths) - lengths)
    positions: IntArray = np.arange(int(lengths.sum())) + np.repeat(shift, lengths)
    return positions
