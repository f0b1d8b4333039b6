"""Watchdog: ends a worker that makes no headway, and says which worker holds the others up.

A worker that is stopped, or stuck in its data or on a device, leaves the others waiting in a collective. Each worker
notes what it does; a thread beside it puts the note on a board that all can read, and looks at the clock.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch.distributed as dist

EXIT_CODE = 75
SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Note:
    """What a worker does."""

    beat: int
    """Grows as long as the process runs."""
    headway: int
    """Grows with each thing done."""
    doing: str


NOT_SEEN = Note(0, 0, "its start")


class Board(Protocol):
    """Where the workers put their notes."""

    def put(self, rank: int, note: Note) -> None:
        """In place of the worker's older one."""

    def notes(self) -> Mapping[int, Note]:
        """By rank, of all workers."""


class StoreBoard:
    """The board of a process group that was set up by MASTER_ADDR: its key-value store, by a connection of its own."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False,
            timeout=timedelta(seconds=SECONDS_BETWEEN_LOOKS),
        )  # fmt: skip

    def put(self, rank: int, note: Note) -> None:
        """In place of the worker's older one."""
        self._store.set(f"seqray/{rank}", json.dumps(asdict(note)))

    def notes(self) -> dict[int, Note]:
        """By rank."""
        there = [rank for rank in range(self._world) if self._store.check([f"seqray/{rank}"])]
        texts = self._store.multi_get([f"seqray/{rank}" for rank in there])
        notes = {rank: Note(**json.loads(text)) for rank, text in zip(there, texts, strict=True)}
        return {rank: notes.get(rank, NOT_SEEN) for rank in range(self._world)}


class Watchdog:
    """Guards one worker; `mark` is its sign of life. Ends the process when none came for `limit_s`."""

    def __init__(
        self, rank: int, limit_s: float, board: Board | None, say: Callable[[str], None],
        end: Callable[[], Any] = lambda: os._exit(EXIT_CODE),
    ) -> None:  # fmt: skip
        """board: None for a worker that has no others beside it; say: takes a line for the log."""
        self._rank, self._limit_s, self._board, self._say, self._end = rank, limit_s, board, say, end
        self._beat, self._headway, self._doing, self._since = 0, 0, "start", time.monotonic()
        self._pause_s = min(SECONDS_BETWEEN_LOOKS, limit_s / 4)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, doing: str) -> None:
        """Something new begins."""
        self._doing, self._since = doing, time.monotonic()
        self._headway += 1

    def close(self) -> None:
        """The worker is through with what is watched."""
        self._over.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._over.is_set():
            self._beat_for(self._pause_s)
            if self._stands_still():
                self._alarm()

    def _stands_still(self) -> bool:
        return time.monotonic() - self._since > self._limit_s and not self._over.is_set()

    def _beat_for(self, seconds: float) -> None:
        """Lets the others see that this process runs."""
        until = time.monotonic() + seconds
        while not self._over.is_set() and time.monotonic() < until:
            self._beat += 1
            if self._board is not None:
                _within(self._pause_s, lambda board: board.put(self._rank, self._note()), self._board)
            self._over.wait(self._pause_s / 2)

    def _note(self) -> Note:
        return Note(self._beat, self._headway, self._doing)

    def _alarm(self) -> None:
        """The lowest worker that still answers tells; a moment later all that answer end themselves."""
        before = self._look()
        self._beat_for(3 * self._pause_s)
        now = self._look()
        if not self._stands_still():
            return
        alive = {rank for rank, note in now.items() if note != before.get(rank)} | {self._rank}
        if self._rank == min(alive):
            self._say(f"no headway for {self._limit_s:g} s (train.hang_timeout_s): {whose_fault(now, alive)}")
        self._beat_for(3 * self._pause_s)  # for the others' look; and the line is on its way
        if self._stands_still():
            self._over.set()
            self._end()

    def _look(self) -> dict[int, Note]:
        """The notes of all workers; only its own when the board, which the first worker keeps, does not answer."""
        found: dict[int, Note] = {}
        if self._board is not None:
            _within(self._pause_s, lambda board: found.update(board.notes()), self._board)
            if not found and self._rank:
                found[0] = NOT_SEEN
        return {**found, self._rank: self._note()}


def whose_fault(notes: Mapping[int, Note], alive: set[int]) -> str:
    """Which workers do not answer, else which are behind the others, and what each of them does."""
    silent = sorted(set(notes) - alive)
    behind = [rank for rank in sorted(alive) if notes[rank].headway < max(notes[rank].headway for rank in alive)]
    parts = [f"worker {rank} does not answer, last seen in {notes[rank].doing}" for rank in silent]
    if not silent:
        parts = [f"worker {rank} is behind, in {notes[rank].doing}" for rank in behind]
    waiting = [rank for rank in sorted(alive) if silent or rank not in behind]
    for doing in dict.fromkeys(notes[rank].doing for rank in waiting):
        ranks = [str(rank) for rank in waiting if notes[rank].doing == doing]
        parts.append(f"worker{'s'[: len(ranks) > 1]} {', '.join(ranks)} in {doing}")
    return "; ".join(parts)


def _within(seconds: float, action: Callable[[Board], Any], board: Board) -> None:
    """Does it in a thread that is left alone when it takes longer: a board that does not answer stops no watchdog."""

    def attempt() -> None:
        try:
            action(board)
        except (RuntimeError, OSError, ValueError):  # what a store raises whose keeper is gone
            return

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
