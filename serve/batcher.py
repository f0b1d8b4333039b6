"""Batcher: requests that arrive while the model works become its next batch."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter
from typing import Any, Generic, NamedTuple, TypeVar

from serve.client import LONG_WAIT_S, Client, ClientLeft
from serve.record import Record, current

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class _Waiting(NamedTuple, Generic[Request, Answer]):
    request: Request
    answer: "asyncio.Future[Answer]"
    record: Record
    since: float
    client: Client | None

    def is_in_vain(self, now: float) -> bool:
        """Whether nobody waits for the answer; who does not know yet is told."""
        if self.answer.done():
            return True
        if self.client is None or now - self.since < LONG_WAIT_S or not self.client.has_left():
            return False
        self.answer.set_exception(ClientLeft())
        return True


class Batcher(Generic[Request, Answer]):
    """Runs `run` on lists of requests in one thread of its own, so that the event loop is never held up.

    Nobody waits for company: when nothing runs a request starts at once, alone. To be used from one event loop.
    """

    def __init__(self, run: Callable[[Sequence[Request]], Sequence[Answer]], max_batch_size: int) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._waiting: deque[_Waiting[Request, Answer]] = deque()
        self._running = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batcher")

    async def submit(self, request: Request, client: Client | None = None, seconds: float | None = None) -> Answer:
        """The answer to `request`; the exception of its batch when that failed.

        TimeoutError when it is not there after `seconds`, ClientLeft when `client` was gone after a long wait: what is
        in no batch by then gets into none.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        record = current()
        record.lap("parse")  # with what was made of the fields before they came here
        self._waiting.append(_Waiting(request, answer, record, perf_counter(), client))
        if not self._running:
            self._start(loop)
        timer = None if seconds is None else loop.call_later(seconds, _give_up, answer)
        try:
            found = await answer
        finally:
            if timer is not None:
                timer.cancel()
        record.skip()
        return found

    @property
    def num_waiting(self) -> int:
        """Requests that are in no batch yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Ends the thread after the batch that runs."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[_Waiting[Request, Answer]] = []
        started = perf_counter()
        while self._waiting and len(batch) < self._max_batch_size:
            waiting = self._waiting.popleft()
            if not waiting.is_in_vain(started):
                batch.append(waiting)
        self._running = bool(batch)
        if batch:
            for waiting in batch:
                waiting.record.longest("queue", started - waiting.since)
            batch[0].record.batches.append(len(batch))
            done = self._thread.submit(self._run_batch, [waiting.request for waiting in batch])
            done.add_done_callback(lambda result: loop.call_soon_threadsafe(self._finish, loop, batch, started, result))

    def _run_batch(self, requests: list[Request]) -> Sequence[Answer]:
        answers = self._run(requests)
        if len(answers) != len(requests):
            raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests")
        return answers

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: list[_Waiting[Request, Answer]],
        started: float,
        result: "Future[Sequence[Answer]]",
    ) -> None:
        self._start(loop)  # first, so that the model works while the answers are sent
        failure, seconds = result.exception(), perf_counter() - started
        for position, waiting in enumerate(batch):
            waiting.record.longest("rank", seconds)
            if waiting.answer.done():
                continue  # its deadline passed
            if failure is not None:
                waiting.answer.set_exception(failure)
            else:
                waiting.answer.set_result(result.result()[position])


def _give_up(answer: "asyncio.Future[Any]") -> None:
    if not answer.done():
        answer.set_exception(TimeoutError())
