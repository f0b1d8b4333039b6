"""EventBuffer: events on their way to the log; requests that arrive together share one write."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from seqray.errors import DataError
from seqray.folder import Folder
from seqray.serve_config import EventsConfig
from serve.event_log import EventLog, Receipt
from serve.event_table import Row
from serve.problems import Problem

Append = Callable[[Sequence[Sequence[Row]]], Sequence[Receipt]]


@dataclass(frozen=True)
class _Waiting:
    rows: Sequence[Row]
    size: int
    receipt: "asyncio.Future[Receipt]"


def open_buffer(config: EventsConfig, retry_after_s: int) -> "EventBuffer | None":
    """The buffer before a log in `config.folder`, which is not asked for anything yet; None without one."""
    if config.folder is None:
        return None
    return EventBuffer(EventLog(Folder.at(config.folder), config.dedupe_window).append, config, retry_after_s)


class EventBuffer:
    """Gives lists of events to `append` in one thread; what arrives meanwhile goes together next.

    To be used from one event loop.
    """

    def __init__(self, append: Append, config: EventsConfig, retry_after_s: int) -> None:
        self.config = config
        self._append = append
        self._headers = {"Retry-After": str(retry_after_s)}
        self._waiting: list[_Waiting] = []
        self._events = self._bytes = 0
        self._writing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="events")

    async def add(self, rows: Sequence[Row], size: int) -> Receipt:
        """Returns when the events are durable. Problem 503 when the buffer is full, or storage fails or is too slow.

        size: bytes that they take here, about. After a 503 the events may be there all the same; to send them again
        is safe.
        """
        config = self.config
        if (
            self._events + len(rows) > config.max_buffered_events
            or self._bytes + size > config.max_buffered_mib * 2**20
        ):
            raise self._unavailable("Too many events wait to be written; send these again later.")
        loop = asyncio.get_running_loop()
        waiting = _Waiting(rows, size, loop.create_future())
        self._waiting.append(waiting)
        self._events, self._bytes = self._events + len(rows), self._bytes + size
        if self._writing is None:
            self._writing = loop.create_task(self._write())
        try:
            # Shielded: they stay in the buffer, and count there, when nobody waits for them any more.
            return await asyncio.wait_for(asyncio.shield(waiting.receipt), config.commit_timeout_s)
        except TimeoutError:
            raise self._unavailable("The events could not be stored in time; send them again.") from None
        except DataError:
            raise self._unavailable("The events could not be stored; send them again.") from None

    def _unavailable(self, detail: str) -> Problem:
        return Problem(503, detail, headers=self._headers)

    async def _write(self) -> None:
        await asyncio.sleep(self.config.commit_wait_ms / 1000)
        while self._waiting:
            together, self._waiting = self._waiting, []
            work = asyncio.get_running_loop().run_in_executor(self._thread, self._append, [w.rows for w in together])
            await asyncio.wait([work])
            self._settle(together, work)
        self._writing = None

    def _settle(self, together: Sequence[_Waiting], work: "asyncio.Future[Sequence[Receipt]]") -> None:
        failure = work.exception()
        for place, waiting in enumerate(together):
            self._events, self._bytes = self._events - len(waiting.rows), self._bytes - waiting.size
            if failure is None:
                waiting.receipt.set_result(work.result()[place])
            else:
                waiting.receipt.set_exception(failure)
                waiting.receipt.exception()  # seen, also when nobody waits for it any more
