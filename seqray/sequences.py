"""The prepared store as arrays on disk, and the batches that are gathered from it.

Shapes: U users, E events, B sequences of a batch, T packed tokens (all real events of a batch, one after the other).
"""

import json
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from seqray.cache import Cache
from seqray.catalogue import Catalogue
from seqray.errors import DataError
from seqray.event_shards import EventShards, ShardColumn, read_shards
from seqray.storage import MANIFEST_FILE
from seqray.vocabulary import ItemVocabulary

FORMAT_VERSION = 1
SEQUENCES_FILE = "sequences.arrow"
USERS_FILE = "users.arrow"
ITEMS_FILE = "items.parquet"
EVENT_TYPES = "event_types"
UNKNOWN_TIME = -(2**63)
"""In a batch: a time that nobody told; it equals no other time, itself included."""
SPLIT_COLUMNS = ("train_end", "val_start", "val_end", "test_start", "test_end")

Kind = TypeVar("Kind", bound=np.generic)
Column = npt.NDArray[Kind] | ShardColumn[Kind]
"""What positions into the log index."""
Split = Literal["val", "test"]
IntArray = npt.NDArray[np.int64]


class SequenceStore:
    """Histories of all users, memory-mapped: one row a user, events oldest first.

    `sequences.arrow` is one Arrow IPC record batch: user_id, items large_list<int32>, timestamps large_list<int64>
    (microseconds since 1970; in file order where the log has no times), event_types large_list<int8> where the log has
    them (place in `data.event_types`, from 1; 0 for any other), and the columns of SPLIT_COLUMNS (int32),
    positions in the user's own history: training is history[:train_end], the targets of validation are
    history[val_start:val_end] and its history is history[:val_start]; test likewise. No target: start == end (with a
    temporal split start is then the number of events before the period, or 0 for a user without history).

    Of a store in shards `users.arrow` has the columns of the users and the position of their first event, and the
    events are columns of files of their own (`seqray.event_shards`).
    """

    def __init__(self, folder: str | Path, location: str | None = None, cache: Cache | None = None) -> None:
        """location: where the store was published, of which `folder` may be a copy; cache: for its shards."""
        self.folder = Path(folder)
        try:
            self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            shards = read_shards(self.folder)
            path = self.folder / (USERS_FILE if shards else SEQUENCES_FILE)
            batch = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (OSError, ValueError, pa.ArrowInvalid) as error:
            raise DataError(f"{self.folder}: not a prepared store: {error}") from error
        if self.manifest.get("format_version") != FORMAT_VERSION:
            raise DataError(
                f"{self.folder}: format_version is {self.manifest.get('format_version')}, not {FORMAT_VERSION}"
            )
        self.user_ids: pa.Array = batch.column("user_id")
        self.shard_bounds: IntArray | None = None
        """Of a store in shards: the position of the first event of each shard, then the number of events."""
        if shards:
            self._open_shards(batch, EventShards(location or str(folder), shards, cache or Cache()))
        else:
            self._open_events(batch)
        split = {name: batch.column(name).to_numpy() for name in SPLIT_COLUMNS}
        self.train_end = split["train_end"]
        self._targets = {
            "val": (split["val_start"], split["val_end"]),
            "test": (split["test_start"], split["test_end"]),
        }

    def _open_events(self, batch: Any) -> None:
        self.offsets: IntArray = batch.column("items").offsets.to_numpy()
        self.items: Column[np.int32] = batch.column("items").values.to_numpy()
        self.timestamps: Column[np.int64] = batch.column("timestamps").values.to_numpy()
        self.event_types: Column[np.int8] | None = None
        if EVENT_TYPES in batch.schema.names:
            self.event_types = batch.column(EVENT_TYPES).values.to_numpy()

    def _open_shards(self, batch: Any, shards: EventShards) -> None:
        self.shard_bounds = shards.bounds
        self.offsets = np.append(batch.column("offset").to_numpy(), shards.bounds[-1])
        self.items = ShardColumn(shards, "items", np.int32)
        self.timestamps = ShardColumn(shards, "timestamps", np.int64)
        typed = self.manifest["data"].get(EVENT_TYPES)
        self.event_types = ShardColumn(shards, EVENT_TYPES, np.int8) if typed else None

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

    @cached_property
    def catalogue(self) -> Catalogue:
        """What a model is built for."""
        return Catalogue(self.num_items, self.items_table, tuple(self.manifest["data"].get(EVENT_TYPES) or ()))

    @property
    def has_timestamps(self) -> bool:
        """Whether the log had times; without them `timestamps` are positions."""
        return bool(self.manifest["has_timestamps"])

    def events_until(self, split: Literal["validation", "test"]) -> IntArray:
        """Number of each user's events that come before the targets of `split`."""
        end: npt.NDArray[np.int32] = self.train_end if split == "validation" else self._targets["test"][0]
        return end.astype(np.int64)

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
        return Batch.gather(self.store, start, self.cut - start).ask_last()

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

    items_T: int64 item_index of each event; lengths_B: events of each sequence, all at least 1.
    asked_P: the events after which a prediction is wanted, ascending indices into T; None: after every event.
    times_T, next_times_T: microseconds since 1970 of the event, and of the event after it (for the newest: of the
    query); None where the log has no times, UNKNOWN_TIME throughout a sequence that came without. events_T: event type
    of each event, 0 for one that is not known; None where the log has no event types.
    """

    items_T: Tensor
    lengths_B: Tensor
    asked_P: Tensor | None = None
    times_T: Tensor | None = None
    next_times_T: Tensor | None = None
    events_T: Tensor | None = None

    @classmethod
    def gather(cls, store: SequenceStore, start: IntArray, lengths: IntArray) -> "Batch":
        """The runs [start : start + length] of the store's events; an empty run becomes one event of padding."""
        empty = lengths == 0
        lengths = np.maximum(lengths, 1)
        places = ranges(np.where(empty, np.maximum(start - 1, 0), start), lengths)
        items = store.items[places].astype(np.int64)
        padding = (np.cumsum(lengths) - lengths)[empty]
        items[padding] = 0
        times = next_times = events = None
        if store.has_timestamps:
            after = store.timestamps[np.minimum(places + 1, len(store.timestamps) - 1)]
            now = store.timestamps[places]
            now[padding] = after[padding]
            times, next_times = torch.from_numpy(now), torch.from_numpy(after)
        if store.event_types is not None:
            kinds = store.event_types[places].astype(np.int64)
            kinds[padding] = 0
            events = torch.from_numpy(kinds)
        return cls(torch.from_numpy(items), torch.from_numpy(lengths), None, times, next_times, events)

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        return self if device.type == "cpu" else Batch(*(_send(getattr(self, f.name), device) for f in fields(self)))

    def last_token_B(self) -> Tensor:
        """Index into T of each sequence's newest event."""
        return self.lengths_B.cumsum(0) - 1

    def ask_last(self) -> "Batch":
        """The same batch with a prediction wanted after each sequence's newest event alone."""
        return replace(self, asked_P=self.last_token_B())

    def rounded(self, multiple: int, longest: int) -> "Batch":
        """The same questions in a batch whose number of events is a multiple: sequences of padding, none longer than
        `longest`, stand at the end, and nothing is asked after them.
        """
        T = len(self.items_T)
        more = -T % multiple
        if not more:
            return self
        pieces = torch.arange(0, more, longest)
        lengths = (more - pieces).clamp(max=longest).to(self.lengths_B)

        def fill(part_T: Tensor | None, value: int) -> Tensor | None:
            return None if part_T is None else torch.cat([part_T, part_T.new_full((more,), value)])

        return Batch(
            torch.cat([self.items_T, self.items_T.new_zeros(more)]), torch.cat([self.lengths_B, lengths]),
            self.asked_places(),
            fill(self.times_T, UNKNOWN_TIME), fill(self.next_times_T, UNKNOWN_TIME), fill(self.events_T, 0),
        )  # fmt: skip

    def asked_places(self) -> Tensor:
        """asked_P, written out where it is every event."""
        return torch.arange(len(self.items_T), device=self.items_T.device) if self.asked_P is None else self.asked_P

    @property
    def asks_few(self) -> bool:
        """Whether a prediction is wanted after less than half of the events, so that it pays to drop the others."""
        return self.asked_P is not None and 2 * len(self.asked_P) < len(self.items_T)

    @property
    def asks_newest(self) -> bool:
        """Whether a prediction is wanted after each sequence's newest event, and after no other; for a CPU."""
        if self.asked_P is None or len(self.asked_P) != len(self.lengths_B):
            return False
        return bool((self.asked_P.numpy() == self.lengths_B.numpy().cumsum() - 1).all())

    def asked(self, hidden_TD: Tensor) -> Tensor:
        """hidden_PD: the rows after which a prediction is wanted."""
        return hidden_TD if self.asked_P is None else hidden_TD.index_select(0, self.asked_P)


def _send(tensor: Tensor | None, device: torch.device) -> Any:
    return None if tensor is None else tensor.pin_memory().to(device, non_blocking=True)


def ranges(start: IntArray, lengths: IntArray) -> IntArray:
    """The integers start[i] .. start[i] + lengths[i] - 1, one run after the other."""
    shift = start - (np.cumsum(lengths) - lengths)
    positions: IntArray = np.arange(int(lengths.sum())) + np.repeat(shift, lengths)
    return positions
