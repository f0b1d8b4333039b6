"""Batcher: requests that arrive while the model works become its next batch."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from time import perf_counter
from typing import Generic, TypeVar

from serve.client import LONG_WAIT_S, Client, ClientLeft
from serve.record import Record, current

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class _Waiting(Generic[Request, Answer]):
    """A request, who waits for its answer and for how long."""

    __slots__ = ("answer", "client", "loop", "record", "request", "since", "timer", "until")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, request: Request, record: Record, client: Client | None,
        seconds: float | None,
    ) -> None:  # fmt: skip
        self.loop, self.request, self.record, self.client = loop, request, record, client
        self.answer: asyncio.Future[Answer] = loop.create_future()
        self.since = perf_counter()
        self.until = None if seconds is None else self.since + seconds
        self.timer: asyncio.TimerHandle | None = None
        self._look_later()

    def _look(self) -> None:
        """Ends the wait when it takes too long or is in vain, else looks again later."""
        if self.answer.done():
            return
        if self.until is not None and perf_counter() >= self.until:
            self.answer.set_exception(TimeoutError())
        elif self.client is not None and self.client.has_left():
            self.answer.set_exception(ClientLeft())
        else:
            self._look_later()

    def _look_later(self) -> None:
        # One timer for both: most requests are answered before it is due.
        left = float("inf") if self.until is None else max(0.0, self.until - perf_counter())
        if self.client is not None:
            left = min(left, LONG_WAIT_S)
        self.timer = None if left == float("inf") else self.loop.call_later(left, self._look)


class Batcher(Generic[Request, Answer]):
    """Runs `run` on lists of requests in one thread of its own, so that the event loop is never held up.

    Nobody waits for company: when nothing runs a request starts at once, alone. The thread takes its next batch itself:
    an event loop with much to do would come to it late. To be used from one event loop.
    """

    def __init__(self, run: Callable[[Sequence[Request]], Sequence[Answer]], max_batch_size: int) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._waiting: deque[_Waiting[Request, Answer]] = deque()
        self._running = False
        self._lock = Lock()
        """Of the two above: no request may come in between the last look at what waits and the end of the work."""
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batcher")

    async def submit(self, request: Request, client: Client | None = None, seconds: float | None = None) -> Answer:
        """The answer to `request`; the exception of its batch when that failed.

        TimeoutError when it is not there after `seconds`, ClientLeft when `client` was gone after a long wait: what is
        in no batch by then gets into none.
        """
        if seconds is not None and seconds <= 0:
            raise TimeoutError
        record = current()
        record.lap("parse")  # with what was made of the fields before they came here
        waiting: _Waiting[Request, Answer] = _Waiting(asyncio.get_running_loop(), request, record, client, seconds)
        with self._lock:
            self._waiting.append(waiting)
            rests, self._running = not self._running, True
        if rests:
            self._thread.submit(self._work, waiting.loop)
        try:
            found = await waiting.answer
        finally:
            if waiting.timer is not None:
                waiting.timer.cancel()
        record.skip()
        return found

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Ends the thread after what waits."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """In the thread: batch after batch, until nothing waits."""
        while batch := self._take():
            started = perf_counter()
            answers, failure = self._run_batch([waiting.request for waiting in batch])
            loop.call_soon_threadsafe(_finish, batch, answers, failure, started)

    def _take(self) -> list[_Waiting[Request, Answer]]:
        batch: list[_Waiting[Request, Answer]] = []
        with self._lock:
            while self._waiting and len(batch) < self._max_batch_size:
                waiting = self._waiting.popleft()
                if not waiting.answer.done():
                    batch.append(waiting)
            self._running = bool(batch)
        return batch

    def _run_batch(self, requests: list[Request]) -> tuple[Sequence[Answer], Exception | None]:
        try:
            answers = self._run(requests)
            if len(answers) != len(requests):
                raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests")
        except Exception as error:  # noqa: BLE001 - it goes to those who asked
            return (), error
        return answers, None


def _finish(
    batch: list[_Waiting[Request, Answer]], answers: Sequence[Answer], failure: Exception | None, started: float
) -> None:
    """In the event loop: everyone gets an answer. Who does not wait any more has got another already."""
    seconds = perf_counter() - started  # with the wait for the event loop, so that the stages add up
    batch[0].record.batches.append(len(batch))
    for position, waiting in enumerate(batch):
        waiting.record.longest("queue", started - waiting.since)
        waiting.record.longest("rank", seconds)
        if waiting.answer.done():
            continue
        if failure is not None:
            waiting.answer.set_exception(failure)
        else:
            waiting.answer.set_result(answers[position])
