"""Checkpoints written while training goes on: the disk has a thread of its own, a step waits for a copy only."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from seqray.errors import SeqrayError
from train.checkpoints import WRITE_ERRORS, Checkpoints, checkpoint_name
from train.state import Snapshot

LAST_TRIES = 3
SECONDS_BETWEEN_TRIES = 2.0


class CheckpointError(SeqrayError):
    """The last checkpoint of a run that cannot be written."""


class CheckpointWriter:
    """Writes one snapshot at a time, for the first worker.

    A write that fails is told and costs nothing but that checkpoint: the next one is the next try. Only the last one,
    without which the training would be lost, is an error.
    """

    def __init__(self, checkpoints: Checkpoints, check: Callable[[], None], tell: Callable[[str], None]) -> None:
        """check: raises when this worker may no longer write; tell: takes a line for the log."""
        self._checkpoints, self._check, self._tell = checkpoints, check, tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: tuple[Snapshot, Future[None]] | None = None
        self._failed: Snapshot | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Starts writing; waits while the one before is still being written."""
        self._wait()
        self._pending = snapshot, self._pool.submit(self._work, snapshot)

    def poll(self) -> None:
        """Tells how a write that has ended went; raises what `check` raised."""
        if self._pending is not None and self._pending[1].done():
            self._wait()

    def finish(self) -> None:
        """Waits for the last one and tries it again when it failed; CheckpointError when it still cannot be written."""
        self._wait()
        for _ in range(LAST_TRIES - 1):
            if self._failed is not None:
                time.sleep(SECONDS_BETWEEN_TRIES)
                self.write(self._failed)
                self._wait()
        if self._failed is not None:
            raise CheckpointError(
                "the last checkpoint cannot be written, so the run is not finished. Make room or mend the storage, "
                "then run the same command: it goes on from the checkpoint before"
            )

    def close(self) -> None:
        """Lets a write that has begun come to its end."""
        self._pool.shutdown()

    def _work(self, snapshot: Snapshot) -> None:
        self._check()
        prepared, name = self._checkpoints.prepare(snapshot)
        self._check()
        self._checkpoints.publish(prepared, name)

    def _wait(self) -> None:
        if self._pending is None:
            return
        (snapshot, written), self._pending = self._pending, None
        self._failed = None
        try:
            written.result()
        except WRITE_ERRORS as error:
            self._failed = snapshot
            self._tell(f"checkpoint {checkpoint_name(snapshot)} not written, training goes on: {error}")
