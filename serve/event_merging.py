"""Many small files of events become few large ones, without a moment in which an event is in none."""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from seqray.errors import DataError
from seqray.folder import Folder
from seqray.table_files import TableFile
from serve.event_table import Names, files_of, firsts, milliseconds_of, name_of, parquet, read

MERGED_AT_A_TIME = 64
"""Files of one day and level that become one file of the next level."""
LEVELS = 2
"""Times that an event is merged with others; `python -m serve.compact` does the rest."""
ROWS_A_FILE = 500_000


def merge(day: Folder, files: Sequence[TableFile], name: Callable[[], str]) -> list[str]:
    """Writes the events of `files`, each event_id once, to new files; then deletes `files`. The names of the new ones.

    A reader may find events twice for a moment, never not at all. DataError when it could not be done; then all files
    are still there, and new ones perhaps too.
    """
    ids = [read(file, ["event_id"]).column("event_id") for file in files]
    keep = firsts(pa.chunked_array([chunk for column in ids for chunk in column.chunks], pa.string()))
    bounds = np.cumsum([0, *map(len, ids)])
    written: list[str] = []
    held: list[Any] = []

    def write() -> None:
        written.append(name())
        day.write_durably(written[-1], parquet(pa.concat_tables(held)))
        held.clear()

    for file, (start, stop) in zip(files, pairwise(bounds), strict=True):
        held.append(read(file).filter(pa.array(keep[start:stop])))
        if sum(map(len, held)) >= ROWS_A_FILE:
            write()
    if held:
        write()
    for file in files:
        day.delete(name_of(file))
    return written


class Merger:
    """Merges the small files of one writer in a thread of its own, so that a day does not become a million files.

    What fails is left as it is: nothing is lost by it.
    """

    def __init__(self, folder: Folder, names: Names) -> None:
        self._folder, self._names = folder, names
        self._waiting: dict[tuple[str, int], list[str]] = defaultdict(list)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="event-merger")

    def wrote(self, day: str, name: str) -> None:
        """Tells of a new file."""
        self._thread.submit(self._add, day, name, 0)

    def close(self) -> None:
        """Returns when all is merged that can be, and ends the thread."""
        self._thread.shutdown()

    def _add(self, day: str, name: str, level: int) -> None:
        if level == LEVELS:
            return
        self._waiting[day, level].append(name)
        if len(self._waiting[day, level]) < MERGED_AT_A_TIME:
            return
        names = self._waiting.pop((day, level))
        try:
            files = [file for file in files_of(self._folder / day) if name_of(file) in names]
            # The place of the first in the order by name, and so by time, is the place of what holds it.
            moment = milliseconds_of(names[0])
            merged = merge(self._folder / day, files, lambda: self._names.next(milliseconds=moment))
        except DataError as error:
            logging.getLogger(__name__).warning("event files were not merged: %s", error)
        else:
            for new in merged:
                self._add(day, new, level + 1)
