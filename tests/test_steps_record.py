"""The record of the steps that a run has made, and of those that were lost."""

from pathlib import Path

from seqray.folder import Folder
from train.steps_record import STEPS_FILE, Steps, StepsRecord, read_steps


def taken_up(folder: Path, at: int, until: int) -> StepsRecord:
    record = StepsRecord(Folder.at(folder), at)
    for step in range(at + 1, until + 1):
        record.made(step)
    record.close()
    return record


def test_steps_since_the_checkpoint_are_counted_over_restarts(tmp_path: Path) -> None:
    assert taken_up(tmp_path, 0, 7).lost == 0
    assert taken_up(tmp_path, 6, 10).lost == 1
    assert taken_up(tmp_path, 6, 6).lost == 4
    assert taken_up(tmp_path, 6, 16).lost == 0
    assert read_steps(Folder.at(tmp_path)) == Steps(wasted=5, restarts=3, step=16)


def test_a_damaged_record_is_none(tmp_path: Path) -> None:
    (tmp_path / STEPS_FILE).write_bytes(b"wasted 0000\xff")
    assert read_steps(Folder.at(tmp_path)) is None
    assert taken_up(tmp_path, 3, 4).steps == Steps(step=4)
