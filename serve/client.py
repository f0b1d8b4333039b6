"""Client: who waits for the answer to a request, and may leave.

To be told of it when it happens takes a task and two wake-ups for each request, a quarter of what Ray Serve costs. So
it is asked instead, when a request waited long and work for nobody could be spared.
"""

from serve.asgi import Message, Receive

LONG_WAIT_S = 0.05
"""A request that waited so long is worth the question."""


class ClientLeft(Exception):
    """Nobody waits for this answer any more."""


class Client:
    """The other end of a request whose body was read."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive

    def has_left(self) -> bool:
        """Whether it hung up, known at once: after the body a server has nothing else to tell."""
        message = at_once(self._receive)
        return message is not None and message["type"] == "http.disconnect"


def at_once(receive: Receive) -> Message | None:
    """The message that is there already; None when one would have to wait, and nothing is lost by asking.

    Servers wait in `receive` for an event or a queue (uvicorn, Ray Serve's proxies), which may be given up.
    """
    waiting = receive().__await__()
    try:
        next(waiting)
    except StopIteration as done:
        message: Message = done.value
        return message
    waiting.close()
    return None
