"""python -m serve.compact CONFIG: the many files of each day of events become few, each event_id once a day.

It may run while events are written, and while another one runs.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from seqray.command import next_command, run_command
from seqray.config import Config
from seqray.errors import ConfigError, DataError

if TYPE_CHECKING:
    from seqray.folder import Folder
    from serve.event_table import Names

TRIES = 10
YOUNG_S = 600.0
"""Files younger than that are left to their writers, who merge them themselves."""
LEFT_OVER_S = 3600.0
"""Age of a temporary file that belongs to no writer any more."""


class Compacted(NamedTuple):
    """What became of a day."""

    day: str
    files_before: int
    files_after: int


def compact(folder: "Folder", min_age_s: float = YOUNG_S) -> list[Compacted]:
    """Compacts each day that has files which are not compact yet; DataError when storage fails, with nothing lost."""
    from serve.event_table import Names, days

    names = Names()
    done = [compact_day(folder / day, names, min_age_s) for day in days(folder)]
    return [one for one in done if one is not None]


def compact_day(day: "Folder", names: "Names", min_age_s: float, tries: int = TRIES) -> Compacted | None:
    """Compacts one day; None when there is nothing to do."""
    from serve.event_merging import merge
    from serve.event_table import COMPACT, files_of, is_temporary, milliseconds_of, name_of

    now = time.time()
    for name in day.names():
        if is_temporary(name) and now - milliseconds_of(name) / 1000 > LEFT_OVER_S:
            day.delete(name)
    files = [file for file in files_of(day) if now - milliseconds_of(name_of(file)) / 1000 >= min_age_s]
    before = [name_of(file) for file in files]
    if len(files) < 2 or all(name.startswith(COMPACT) for name in before):
        return None
    try:
        after = merge(day, files, lambda: names.next(COMPACT))
    except DataError:
        if tries > 1 and not set(before) <= {name_of(file) for file in files_of(day)}:
            return compact_day(day, names, min_age_s, tries - 1)  # a writer merged some of them meanwhile
        raise
    return Compacted(day.name, len(before), len(after))


def main(argv: list[str] | None = None) -> int:
    """The command; the exit status."""
    return run_command("serve.compact", "Puts the small files of events together.", _compact, argv=argv)


def _compact(config: Config, arguments: argparse.Namespace) -> None:
    from seqray.folder import Folder

    if config.serve.events.folder is None:
        raise ConfigError("serve.events.folder: name the folder of events")
    folder = Folder.at(config.serve.events.folder)
    for day in (found := compact(folder)):
        print(f"{day.day}: {day.files_before:,} files -> {day.files_after:,}")
    print(f"compacted {len(found)} day(s) of {folder}; files of the last {YOUNG_S / 60:g} minutes are left for later")
    print(f"next:  {next_command('train.prepare', arguments, f'data.path={folder}')}")


if __name__ == "__main__":
    sys.exit(main())
