"""A response in one write.

uvicorn makes two, of the head and of the body, and uvloop sends each at once: a packet for which HAProxy wakes up, and
the client after it.
"""

from typing import Any

from serve.asgi import Message, Send


class _Joining:
    """Stands for a transport: keeps what is written until it is flushed or closed."""

    def __init__(self, transport: Any) -> None:
        self._transport = transport
        self._written: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._written.append(data)

    def flush(self) -> None:
        if self._written:
            self._transport.write(b"".join(self._written))
            self._written.clear()

    def close(self) -> None:
        self.flush()
        self._transport.close()


async def send_together(send: Send, start: Message, body: Message) -> None:
    """Sends the first two messages of a response; in one write where `send` is uvicorn's and knows its transport."""
    cycle: Any = getattr(send, "__self__", None)
    transport = getattr(cycle, "transport", None)
    if transport is None:
        await send(start)
        await send(body)
        return
    joining = cycle.transport = _Joining(transport)
    try:
        await send(start)
        await send(body)
    finally:
        cycle.transport = transport
        joining.flush()
