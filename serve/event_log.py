"""EventLog: events in a folder, durable when `append` returns, each event_id once."""

import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from seqray.errors import DataError
from seqray.folder import Folder
from serve.event_merging import Merger
from serve.event_table import Names, Row, day_of, files_of, parquet, read, table_of

DAY_US = 86_400_000_000


class Receipt(NamedTuple):
    """What became of one list of events."""

    accepted: int
    duplicates: int
    """Events that were there before, by their event_id."""


class EventLog:
    """One writer; there may be others to the same folder. `append` is to be called from one thread at a time.

    What counts as there before: the newest `window` ids (up to twice as many) of those that this writer wrote, and of
    the files of today and yesterday (UTC) that it found when it began. Two writers may so keep the same event;
    compaction and `data.columns.event_id` leave one.
    """

    def __init__(self, folder: Folder, window: int) -> None:
        self._folder, self._names, self._known = folder, Names(), RecentIds(window)
        self._merger = Merger(folder, self._names)
        self._began = False

    def append(self, lists: Sequence[Sequence[Row]]) -> list[Receipt]:
        """Writes all events of the lists that are new; DataError when some could not be written.

        Those that could be are known from then on, so that the same lists can be given again.
        """
        while not self._began:
            self._began = self._remember_files()
        new: dict[str, Row] = {}
        receipts = []
        for rows in lists:
            before = len(new)
            for row in rows:
                if row["event_id"] not in self._known:
                    new.setdefault(row["event_id"], row)
            receipts.append(Receipt(len(new) - before, len(rows) - len(new) + before))
        by_day: dict[str, list[Row]] = defaultdict(list)
        for row in new.values():
            by_day[day_of(row["timestamp"])].append(row)
        for day, rows in by_day.items():
            name = self._names.next()
            (self._folder / day).write_durably(name, parquet(table_of(rows)))
            self._known.update(row["event_id"] for row in rows)
            self._merger.wrote(day, name)
        return receipts

    def close(self) -> None:
        """Returns when the files are merged as far as they can be."""
        self._merger.close()

    def _remember_files(self) -> bool:
        """Whether it could be done; not where a file became another meanwhile."""
        now = time.time_ns() // 1000
        files = [file for day in (now - DAY_US, now) for file in files_of(self._folder / day_of(day))]
        newest: list[list[str]] = []
        count = 0
        for file in reversed(files):
            if count >= self._known.size:
                break
            try:
                newest.append(read(file, ["event_id"]).column("event_id").to_pylist())
            except DataError:
                if file.is_there():
                    raise
                return False
            count += len(newest[-1])
        for ids in reversed(newest):
            self._known.update(ids)
        return True


class RecentIds:
    """The newest ids: at least `size` of them once there were so many, at most twice as many."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._new: set[str] = set()
        self._old: set[str] = set()

    def __contains__(self, event_id: str) -> bool:
        return event_id in self._new or event_id in self._old

    def update(self, ids: Iterable[str]) -> None:
        """Adds ids, newest last."""
        for event_id in ids:
            if len(self._new) >= self.size:
                self._old, self._new = self._new, set()
            self._new.add(event_id)
