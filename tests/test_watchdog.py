"""The watchdog: which worker is named when no headway is made, and when it keeps still."""

import threading
import time
from collections.abc import Mapping

from train.watchdog import Note, Watchdog, whose_fault


class Blackboard:
    """A board in memory."""

    def __init__(self) -> None:
        self._notes: dict[int, Note] = {}

    def put(self, rank: int, note: Note) -> None:
        self._notes[rank] = note

    def notes(self) -> Mapping[int, Note]:
        return dict(self._notes)


class Deaf(Blackboard):
    """A board whose keeper is stopped."""

    def put(self, rank: int, note: Note) -> None:
        time.sleep(3600)

    def notes(self) -> Mapping[int, Note]:
        time.sleep(3600)
        return {}


def test_the_one_that_does_not_answer_is_named() -> None:
    notes = {0: Note(9, 57, "step 57"), 1: Note(3, 57, "step 57"), 2: Note(9, 57, "step 57")}
    expected = "worker 1 does not answer, last seen in step 57; workers 0, 2 in step 57"
    assert whose_fault(notes, {0, 2}) == expected


def test_the_one_that_is_behind_is_named() -> None:
    notes = {0: Note(9, 57, "step 57"), 1: Note(9, 56, "data of step 57"), 2: Note(9, 57, "step 57")}
    assert whose_fault(notes, {0, 1, 2}) == "worker 1 is behind, in data of step 57; workers 0, 2 in step 57"


def test_all_in_the_same_place() -> None:
    assert whose_fault({0: Note(9, 5, "step 5")}, {0}) == "worker 0 in step 5"


def test_a_worker_without_headway_ends_and_is_told_once() -> None:
    board, lines, ended = Blackboard(), list[str](), threading.Semaphore(0)
    board.put(1, Note(4, 1, "step 1"))  # stopped: its beat does not grow
    dogs = [Watchdog(rank, 0.4, board, lines.append, ended.release) for rank in (0, 2)]
    for dog in dogs:
        dog.mark("step 1")
    assert ended.acquire(timeout=60) and ended.acquire(timeout=60)
    assert lines == [
        "no headway for 0.4 s (train.hang_timeout_s): worker 1 does not answer, last seen in step 1; "
        "workers 0, 2 in step 1"
    ]


def test_the_first_worker_is_named_when_its_board_does_not_answer() -> None:
    lines, ended = list[str](), threading.Event()
    Watchdog(1, 0.4, Deaf(), lines.append, ended.set).mark("step 7")
    assert ended.wait(60)
    assert "worker 0 does not answer, last seen in its start; worker 1 in step 7" in lines[0]


def test_headway_keeps_it_still() -> None:
    lines, ended = list[str](), threading.Event()
    dog = Watchdog(0, 30.0, None, lines.append, ended.set)
    dog.mark("step 1")
    dog.close()
    assert not lines
    assert not ended.is_set()
