"""The steps that a run has made over all its attempts, those included that were lost with a worker."""

import contextlib
import os
import re
import threading
from dataclasses import dataclass, replace

from seqray.errors import DataError
from seqray.folder import Folder

STEPS_FILE = "steps.txt"
LINE = re.compile(r"wasted (\d{12}) restarts (\d{12}) step (\d{12})\n")
SECONDS_BETWEEN_UPLOADS = 5.0


@dataclass(frozen=True)
class Steps:
    """Of one run."""

    wasted: int = 0
    """Steps made and lost: those since the checkpoint that a restart took up."""
    restarts: int = 0
    """Times the run was taken up again."""
    step: int = 0
    """The last step made."""

    @property
    def line(self) -> str:
        """As it stands in the file, always as long."""
        return f"wasted {self.wasted:012d} restarts {self.restarts:012d} step {self.step:012d}\n"


class StepsRecord:
    """Kept by the first worker. A local file changes with each step, so that a killed process loses nothing of it;
    behind a URI a thread writes it every few seconds, and at the most so much is not counted.
    """

    def __init__(self, folder: Folder, from_step: int) -> None:
        """A run, or what is left of one, is taken up at `from_step`."""
        before = read_steps(folder)
        self.lost = max(0, before.step - from_step) if before else 0
        """Steps that were made after the checkpoint and are to be made again."""
        self.steps = Steps(before.wasted + self.lost, before.restarts + 1, from_step) if before else Steps()
        self._folder, self._file = folder, -1
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if folder.is_local:
            folder.path.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder.path / STEPS_FILE, os.O_RDWR | os.O_CREAT, 0o666)
        else:
            self._thread = threading.Thread(target=self._keep_uploading, name="steps-record", daemon=True)
            self._thread.start()
        self.made(from_step)

    def made(self, step: int) -> None:
        """Step `step` of the run was made."""
        self.steps = replace(self.steps, step=step)
        if self._thread is None:
            with contextlib.suppress(OSError):  # a full disk: the next step tries again
                os.pwrite(self._file, self.steps.line.encode(), 0)

    def close(self) -> None:
        """No more steps are made."""
        self._over.set()
        if self._thread is None:
            os.close(self._file)
        else:
            self._thread.join()

    def _keep_uploading(self) -> None:
        last = False
        while not last:
            with contextlib.suppress(DataError):  # storage that is away: the next look tries again
                self._folder.write_text(STEPS_FILE, self.steps.line)
            last = self._over.wait(SECONDS_BETWEEN_UPLOADS)
        with contextlib.suppress(DataError):
            self._folder.write_text(STEPS_FILE, self.steps.line)


def read_steps(folder: Folder) -> Steps | None:
    """The record of a run; None when it has none, or one that cannot be read."""
    try:
        found = LINE.fullmatch(folder.read_text(STEPS_FILE) or "")
    except DataError:
        return None
    return Steps(*(int(number) for number in found.groups())) if found else None
