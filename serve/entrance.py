"""Entrance: what every request passes on its way in and out: keys, limits, slow senders, counts and the log."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from serve.access import Access, access
from serve.asgi import Application, Message, Receive, Send
from serve.client import at_once
from serve.guard import Guard, Refusal
from serve.journal import Journal
from serve.measures import KEYS_REFUSED, RATE_LIMITED, Measures
from serve.problems import Problem
from serve.record import Record, begin
from serve.request_id import fit_or_new
from serve.trace import pass_on

MAX_HEADERS = 64
MAX_HEADER_BYTES = 16_384
CLIENT_LEFT = 499


class Entrance:
    """ASGI middleware. What it refuses is a Problem like others, counted and logged, and never reaches a handler."""

    def __init__(
        self,
        application: Application,
        measures: Measures,
        guard: Guard | None = None,
        journal: Journal | None = None,
        body_timeout_s: float = 10.0,
    ) -> None:
        self._application, self._measures, self._guard = application, measures, guard
        self._journal, self._body_timeout_s = journal or Journal(), body_timeout_s

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        asked = access(scope["path"])
        record = begin(asked.endpoint)
        traceparent = _read_headers(record, scope["headers"])
        send_noting = _noting(record, traceparent, send)
        try:
            refusal = self._refusal(record, scope["headers"], asked)
            if refusal is not None:
                await refusal.response({"X-Request-Id": record.request_id})(scope, receive, send_noting)
            elif scope["method"] == "POST":
                await self._application(scope, _in_time(receive, self._body_timeout_s), send_noting)
            else:
                await self._application(scope, receive, send_noting)
        except asyncio.CancelledError:
            record.status = CLIENT_LEFT
            raise
        finally:
            record.last = record.started
            record.lap("total")
            self._measures.done(record)
            self._journal.note(record)

    def _refusal(self, record: Record, headers: list[tuple[bytes, bytes]], asked: Access) -> Problem | None:
        if len(headers) > MAX_HEADERS or sum(len(name) + len(value) for name, value in headers) > MAX_HEADER_BYTES:
            return Problem(431, f"More than {MAX_HEADERS} headers or {MAX_HEADER_BYTES} bytes of them.")
        if self._guard is None:
            return None
        try:
            record.key = self._guard.admit(headers, asked)
        except Refusal as refusal:
            record.key = refusal.key
            if refusal.status == 429:
                self._measures.count(RATE_LIMITED, (refusal.key or "",))
            else:
                self._measures.count(KEYS_REFUSED, (refusal.reason,))
            return refusal
        return None


def _read_headers(record: Record, headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """Notes what the log tells of the headers; the `traceparent` of the answer."""
    given, traceparent = "", None
    for name, value in headers:
        if name == b"x-request-id":
            given = value.decode("latin-1")
        elif name == b"traceparent":
            passed_on = pass_on(value)
            if passed_on is not None:
                record.trace, traceparent = passed_on
    record.request_id = fit_or_new(given)
    return traceparent


def _noting(record: Record, traceparent: bytes | None, send: Send) -> Send:
    async def send_noting(message: Message) -> None:
        if message["type"] == "http.response.start":
            record.status = message["status"]
            if traceparent is not None:
                message["headers"] = [*message["headers"], (b"traceparent", traceparent)]
        await send(message)

    return send_noting


def _in_time(receive: Receive, seconds: float) -> Receive:
    """Problem 408 when the body is not there in time: one that trickles in would hold its place in the replica."""
    deadline = asyncio.get_running_loop().time() + seconds
    is_whole = False

    async def receive_in_time() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()  # whether the client leaves; that may take as long as it takes
        message = at_once(receive)  # as a rule it is there, and needs no timer
        if message is None:
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                detail = f"The body did not arrive within {seconds:g} seconds."
                raise Problem(408, detail, headers={"Connection": "close"}) from None
        is_whole = not message.get("more_body", False)
        return message

    return receive_in_time
