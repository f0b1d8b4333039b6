"""The lines that tell how a run goes, in `train.log` of its folder; workers need to share no disk with the command."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from seqray.errors import DataError
from seqray.folder import Folder

LOG_FILE = "train.log"
SECONDS_BETWEEN_UPLOADS = 5.0
SECONDS_BETWEEN_LOOKS = 0.3

Say = Callable[[str], None]
"""Takes one line of a run's log."""


class RunLog:
    """`train.log` of a run, continued by later attempts; `echo` prints the lines too.

    A local file grows by each line. Behind a URI nothing can be appended to: there the whole log is written anew by a
    thread, every few seconds while lines come, and once more by `close`. A full disk, or storage that is away for a
    while, stops nobody: what could not be written is written with a later line.
    """

    def __init__(self, folder: Folder, *, echo: bool) -> None:
        self._folder, self._echo = folder, echo
        self._closed, self._one_at_a_time = threading.Event(), threading.Lock()
        self._text, self._stored, self._unwritten = "", "", b""
        self._thread: threading.Thread | None = None
        if not folder.is_local:
            self._text = self._stored = folder.read_text(LOG_FILE) or ""
            self._thread = threading.Thread(target=self._keep_uploading, name="run-log", daemon=True)
            self._thread.start()

    def say(self, line: str) -> None:
        """Adds a line."""
        with self._one_at_a_time:
            if self._thread is None:
                self._append((line + "\n").encode())
            else:
                self._text += line + "\n"
            if self._echo:
                print(line, flush=True)

    def _append(self, line: bytes) -> None:
        self._unwritten += line
        with contextlib.suppress(OSError), (self._folder.path / LOG_FILE).open("ab", buffering=0) as file:
            while self._unwritten:
                self._unwritten = self._unwritten[file.write(self._unwritten) :]

    def close(self) -> None:
        """The log is stored as a whole, if storage can be reached."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _keep_uploading(self) -> None:
        last = False
        while not last:
            last = self._closed.wait(SECONDS_BETWEEN_UPLOADS)
            text = self._text
            if text != self._stored:
                with contextlib.suppress(DataError):  # the next look tries again
                    self._folder.write_text(LOG_FILE, text)
                    self._stored = text


@contextmanager
def collected(log: RunLog) -> Iterator[Any]:
    """A handle for the workers of a cluster: what they say by `sender(handle)` comes to `log`.

    An actor on the command's own node holds the lines until a thread of the command takes them; it needs no disk that
    both see, and ends with the command.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    mailbox = ray.remote(num_cpus=0)(Mailbox).options(scheduling_strategy=here, max_restarts=-1).remote()
    over = threading.Event()
    thread = threading.Thread(target=_follow, args=(mailbox, log, over), name="run-log-follower", daemon=True)
    thread.start()
    try:
        yield mailbox
    finally:
        over.set()
        thread.join()
        ray.kill(mailbox)


class Mailbox:
    """The lines that nobody has taken yet; a Ray actor."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def put(self, line: str) -> None:
        """Adds a line."""
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last call."""
        taken, self._lines = self._lines, []
        return taken


def sender(mailbox: Any) -> Say:
    """What sends a line to a mailbox without waiting for it."""

    def say(line: str) -> None:
        mailbox.put.remote(line)

    return say


def _follow(mailbox: Any, log: RunLog, over: threading.Event) -> None:
    import ray

    last = False
    while not last:
        last = over.wait(SECONDS_BETWEEN_LOOKS)
        with contextlib.suppress(ray.exceptions.RayError):  # it is started again when it dies
            for line in ray.get(mailbox.take.remote()):
                log.say(line)
