"""Events as Parquet: the columns, and what the files are called.

`date=2026-11-25/events-<milliseconds>-<writer>-<number>.parquet`: a folder for each day of the events' own times in
UTC, names that sort by when they were written and that no two writers share. `compact-` files hold all events of a day
up to then.
"""

import io
import itertools
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from seqray.folder import Folder
from seqray.table_files import TableFile, as_array, find_files, read_columns

TIME = pa.timestamp("us", "UTC")
SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("history_id", pa.string()),
        ("user_id", pa.string()),
        ("session_id", pa.string()),
        ("item_id", pa.string()),
        ("event", pa.string()),
        ("timestamp", TIME),
        ("recommendation_id", pa.string()),
        ("model_version", pa.string()),
        ("variant", pa.string()),
        ("rank", pa.int32()),
        ("value", pa.float64()),
        ("quantity", pa.float64()),
        ("price", pa.float64()),
        ("received", TIME),
    ]
)
"""history_id is the user_id, or the session_id where there is none; received is the server's time."""
DAY = "date="
EVENTS, COMPACT = "events", "compact"
NAME = re.compile(rf"({EVENTS}|{COMPACT})-[0-9]{{13}}-[0-9a-f]{{12}}-[0-9]{{6,}}\.parquet")

Row = Mapping[str, Any]
"""A value for each column; times in microseconds since 1970."""


class Names:
    """Names of new files, none of which was or will be given twice."""

    def __init__(self) -> None:
        self._writer, self._numbers = uuid.uuid4().hex[:12], itertools.count(1)  # which threads may share

    def next(self, kind: str = EVENTS, milliseconds: int | None = None) -> str:
        """A name that sorts by `milliseconds` since 1970, now when not given."""
        moment = time.time_ns() // 1_000_000 if milliseconds is None else milliseconds
        return f"{kind}-{moment:013d}-{self._writer}-{next(self._numbers):06d}.parquet"


def milliseconds_of(name: str) -> int:
    """The time in the name of a file."""
    return int(name.split("-")[1])


def day_of(microseconds: int) -> str:
    """The folder of events at a time."""
    return f"{DAY}{datetime.fromtimestamp(microseconds // 1_000_000, UTC):%Y-%m-%d}"


def days(folder: Folder) -> list[str]:
    """The folders of days, oldest first; DataError when they cannot be listed."""
    return [name for name in folder.names() if name.startswith(DAY)]


def is_temporary(name: str) -> bool:
    """Whether a file is one that is being written, or that a killed writer left."""
    return name.startswith(".") and is_ours(name[1:].rpartition(".")[0])


def table_of(rows: Sequence[Row]) -> Any:
    """An Arrow table of rows."""
    return pa.Table.from_pylist([dict(row) for row in rows], SCHEMA)


def parquet(table: Any) -> bytes:
    """The bytes of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def files_of(day: Folder) -> list[TableFile]:
    """The complete files of a day that were written here, by name; none when the day is not there."""
    if not any(is_ours(name) for name in day.names()):
        return []
    return [file for file in find_files(day.location, "parquet") if is_ours(name_of(file))]


def is_ours(name: str) -> bool:
    """Whether a file's name is one that `Names` gives."""
    return NAME.fullmatch(name) is not None


def name_of(file: TableFile) -> str:
    """A file's name without its folder."""
    return file.path.rpartition("/")[2]


def read(file: TableFile, columns: Sequence[str] | None = None) -> Any:
    """The events of a file, or some of their columns; DataError when it cannot be read."""
    return read_columns(file, columns or SCHEMA.names)


def firsts(ids: Any) -> npt.NDArray[np.bool_]:
    """Which of the event ids (a chunked array) no earlier one equals."""
    codes = as_array(ids).dictionary_encode().indices
    first = np.zeros(len(codes), np.bool_)
    first[np.unique(codes.to_numpy(), return_index=True)[1]] = True
    return first
