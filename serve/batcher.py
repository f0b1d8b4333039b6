"""Batcher: requests that arrive while the model works become its next batch."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Batcher(Generic[Request, Answer]):
    """Runs `run` on lists of requests in one thread of its own, so that the event loop is never held up.

    Nobody waits for company: when nothing runs a request starts at once, alone. To be used from one event loop.
    """

    def __init__(self, run: Callable[[Sequence[Request]], Sequence[Answer]], max_batch_size: int) -> None:
        self._run = run
        self._max_batch_size = max_batch_size
        self._waiting: deque[tuple[Request, asyncio.Future[Answer]]] = deque()
        self._running = False
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batcher")

    async def submit(self, request: Request) -> Answer:
        """The answer to `request`; the exception of its batch when that failed."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Answer] = loop.create_future()
        self._waiting.append((request, answer))
        if not self._running:
            self._start(loop)
        return await answer

    def close(self) -> None:
        """Ends the thread after the batch that runs."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        batch: list[tuple[Request, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._max_batch_size:
            request, answer = self._waiting.popleft()
            if not answer.cancelled():
                batch.append((request, answer))
        self._running = bool(batch)
        if batch:
            done = self._thread.submit(self._run_batch, [request for request, _ in batch])
            answers = [answer for _, answer in batch]
            done.add_done_callback(lambda result: loop.call_soon_threadsafe(self._finish, loop, answers, result))

    def _run_batch(self, requests: list[Request]) -> Sequence[Answer]:
        answers = self._run(requests)
        if len(answers) != len(requests):
            raise RuntimeError(f"{len(answers)} answers to {len(requests)} requests")
        return answers

    def _finish(
        self,
        loop: asyncio.AbstractEventLoop,
        waiting: list["asyncio.Future[Answer]"],
        result: "Future[Sequence[Answer]]",
    ) -> None:
        self._start(loop)  # first, so that the model works while the answers are sent
        failure = result.exception()
        for position, answer in enumerate(waiting):
            if answer.done():
                continue  # the client left
            if failure is not None:
                answer.set_exception(failure)
            else:
                answer.set_result(result.result()[position])
