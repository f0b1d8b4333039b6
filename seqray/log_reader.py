"""Reading the log: the user's columns checked, rows that cannot be used put aside with a reason."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from seqray.data_config import DataConfig
from seqray.errors import DataError
from seqray.id_columns import encode_ids, id_column
from seqray.interactions import Interactions
from seqray.table_files import TableFile, as_array, find_files, read_columns
from seqray.timestamps import time_column

IntArray = npt.NDArray[np.int64]

SHOWN = 10
"""Values that an error message tells."""
REASONS = ("null_user_id", "null_item_id", "null_timestamp", "bad_timestamp")


@dataclass(frozen=True)
class Log:
    """All usable rows of the log in file order, and the others."""

    events: Interactions
    tie: IntArray | None
    """E: rank of each event in the tie column, when there is one."""
    rows_read: int
    bad_rows: Any
    """Arrow table: file, row (1 is the first after a header), reason, and the values as text."""
    other_events: int = 0
    """Rows that `data.keep_events` left out."""
    repeated_events: int = 0
    """Rows whose event id an earlier row had."""

    @property
    def quarantined(self) -> dict[str, int]:
        """Number of bad rows by reason."""
        reasons = self.bad_rows.column("reason").to_pylist()
        return {reason: reasons.count(reason) for reason in REASONS if reason in reasons}


@dataclass(frozen=True)
class _Part:
    users: Any
    items: Any
    times: IntArray | None
    baskets: Any
    event_types: Any
    event_ids: Any
    ties: Any
    rows: int
    other_events: int
    bad_rows: Any

    def filtered(self, keep: Any) -> "_Part":
        """The rows of a mask."""

        def some(column: Any) -> Any:
            return None if column is None else column.filter(keep)

        return replace(
            self, users=some(self.users), items=some(self.items), baskets=some(self.baskets),
            event_types=some(self.event_types), event_ids=some(self.event_ids), ties=some(self.ties),
            times=None if self.times is None else self.times[np.asarray(keep)],
        )  # fmt: skip


def read_log(data: DataConfig) -> Log:
    """The log at `data.path`; DataError names the file and column that do not fit."""
    files = find_files(data.path, data.format)
    parts = _read_settled(files, data) if data.columns.event_id else [_read(file, data) for file in files]
    usable = sum(len(part.users) for part in parts)
    if data.columns.event_id:
        parts = _without_repeated_events(parts)
    guess = files[0].format == "csv"
    user_ids, users = encode_ids([part.users for part in parts], guess)
    item_ids, items = encode_ids([part.items for part in parts], guess)
    times = [part.times for part in parts if part.times is not None]
    events = Interactions(
        user_ids=user_ids,
        item_ids=item_ids,
        users_E=users,
        items_E=items,
        timestamps_E=np.concatenate(times) if times else np.arange(len(users)),
        baskets_E=_baskets([part.baskets for part in parts]) if data.columns.basket else None,
        event_types_E=_event_types([part.event_types for part in parts], data) if data.event_types else None,
    )
    tie = _ranks([part.ties for part in parts], files[0], str(data.tie_column)) if data.tie_column else None
    bad_rows = pa.concat_tables(part.bad_rows for part in parts)
    rows, others = sum(part.rows for part in parts), sum(part.other_events for part in parts)
    return Log(events, tie, rows, bad_rows, others, usable - len(events))


def _read_settled(files: Sequence[TableFile], data: DataConfig) -> list[_Part]:
    """The parts of a log with event ids, in which files may become others while it is read, as compaction does it.

    What was in a file that is gone is in one that was there before it went, perhaps a second time.
    """
    parts, known = [], {file.name for file in files}
    while files:
        some_went = False
        for file in files:
            try:
                parts.append(_read(file, data))
            except DataError:
                if file.is_there():
                    raise
                some_went = True
        files = [file for file in find_files(data.path, data.format) if file.name not in known] if some_went else []
        known |= {file.name for file in files}
    return parts


def _read(file: TableFile, data: DataConfig) -> _Part:
    columns = data.columns
    ours = {"user_id": columns.user_id, "item_id": columns.item_id}
    if columns.timestamp is not None:
        ours["timestamp"] = columns.timestamp
    more = (columns.basket, columns.event, columns.event_id, data.tie_column)
    others = [name for name in more if name is not None]
    names = list(dict.fromkeys([*ours.values(), *others]))
    table = read_columns(file, names, as_text=names)

    def where(column: str) -> str:
        return f"{file.name}: column {column!r} (columns: {', '.join(table.column_names)})"

    def ids(column: str) -> Any:
        return id_column(table.column(column), where(column))

    users, items = ids(columns.user_id), ids(columns.item_id)
    bad = {"null_user_id": _null(users), "null_item_id": _null(items)}
    times = None
    if columns.timestamp is not None:
        raw = table.column(columns.timestamp)
        times, timed = time_column(raw, data.timestamp_unit, data.timestamp_format, where(columns.timestamp))
        bad |= {"null_timestamp": _null(raw), "bad_timestamp": ~timed}
    wanted = _kept_events(table.column(columns.event), data.keep_events) if columns.event else None
    if wanted is not None:  # what is left out cannot be bad
        bad = {reason: mask & wanted for reason, mask in bad.items()}
    part = _Part(
        users,
        items,
        times,
        ids(columns.basket) if columns.basket else None,
        _text(table.column(columns.event)).dictionary_encode() if data.event_types else None,
        as_array(table.column(columns.event_id)) if columns.event_id else None,
        table.column(data.tie_column) if data.tie_column else None,
        table.num_rows,
        0 if wanted is None else int((~wanted).sum()),
        _bad_rows(file, table, ours, bad),
    )
    good = ~np.logical_or.reduce(list(bad.values()))
    return part.filtered(pa.array(good if wanted is None else good & wanted))


def _kept_events(column: Any, kept: Sequence[str]) -> npt.NDArray[np.bool_] | None:
    """Which rows `data.keep_events` keeps; None when it keeps all."""
    if not kept:
        return None
    return np.asarray(pc.is_in(_text(column), pa.array(kept, pa.large_string())))


def _without_repeated_events(parts: Sequence[_Part]) -> list[_Part]:
    """The parts without rows whose event id an earlier row has; a row without an id stays."""
    codes = pa.concat_arrays([part.event_ids.cast(pa.large_string()) for part in parts]).dictionary_encode().indices
    first = np.zeros(len(codes), np.bool_)
    first[np.unique(codes.fill_null(-1).to_numpy(), return_index=True)[1]] = True
    first |= _null(codes)
    bounds = np.cumsum([0, *(len(part.event_ids) for part in parts)])
    return [
        part.filtered(pa.array(first[start:stop])) for part, (start, stop) in zip(parts, pairwise(bounds), strict=True)
    ]


def _null(column: Any) -> npt.NDArray[np.bool_]:
    nulls: npt.NDArray[np.bool_] = np.asarray(column.is_null())
    return nulls


def _bad_rows(file: TableFile, table: Any, ours: dict[str, str], bad: dict[str, npt.NDArray[np.bool_]]) -> Any:
    rows = np.flatnonzero(np.logical_or.reduce(list(bad.values())))
    # A row has the first reason that holds.
    reasons = np.select([mask[rows] for mask in bad.values()], list(bad), default="")
    values = {name: table.column(column).take(rows) for name, column in ours.items()}
    return pa.table(
        {
            "file": pa.array([file.name] * len(rows), pa.large_string()),
            "row": pa.array(rows + 1, pa.int64()),
            "reason": pa.array(reasons.tolist(), pa.large_string()),
            **{name: _text(column) for name, column in values.items()},
        }
    )


def _text(column: Any) -> Any:
    plain = column.combine_chunks()
    try:
        return plain.cast(pa.large_string())
    except pa.ArrowException:
        return pa.array([None if value is None else str(value) for value in plain.to_pylist()], pa.large_string())


def _baskets(parts: Sequence[Any]) -> IntArray:
    """A code for each basket id; -1 where a row has none."""
    kinds = {part.type for part in parts}
    text = [part.cast(pa.large_string()) if len(kinds) > 1 else part for part in parts]
    codes: IntArray = pa.concat_arrays(text).dictionary_encode().indices.fill_null(-1).to_numpy().astype(np.int64)
    return codes


def _event_types(parts: Sequence[Any], data: DataConfig) -> npt.NDArray[np.int8]:
    """The place of each event's type in `data.event_types`, from 1; DataError when no event has one of them."""
    listed = pa.array(data.event_types, pa.large_string())
    codes = []
    for part in parts:
        place = pc.fill_null(pc.index_in(part.dictionary, listed), -1).to_numpy(zero_copy_only=False) + 1
        # A null has the code -1, which finds the 0 at the end.
        codes.append(np.append(place, 0).astype(np.int8)[part.indices.fill_null(-1).to_numpy(zero_copy_only=False)])
    types = np.concatenate(codes)
    if len(types) and not types.any():
        found = sorted({value for part in parts for value in part.dictionary.to_pylist()})
        raise DataError(
            f"{data.path}: column {data.columns.event!r} holds none of data.event_types {', '.join(data.event_types)}; "
            f"it holds {', '.join(found[:SHOWN]) or 'nulls'}{', ...' if len(found) > SHOWN else ''}"
        )
    return types


def _ranks(parts: Sequence[Any], file: TableFile, column: str) -> IntArray:
    """The rank of each value in the tie column, equal values alike, no value last."""
    try:
        values = pa.chunked_array([as_array(part) for part in parts])
        if file.format == "csv":
            values = _numbers_if_all(values)
        rank = pc.rank(values, sort_keys="ascending", tiebreaker="dense")
    except (pa.ArrowException, TypeError) as error:
        raise DataError(f"{file.name}: column {column!r} cannot order events: {error}") from error
    ranks: IntArray = rank.to_numpy().astype(np.int64)
    return ranks


def _numbers_if_all(values: Any) -> Any:
    try:
        return values.cast(pa.float64())
    except pa.ArrowInvalid:
        return values
