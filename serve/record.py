"""Record: what one request is to metrics and logs. No id of a user or item, and nothing of a body, ever gets in."""

from contextvars import ContextVar
from time import perf_counter

STAGES = ("read", "parse", "queue", "rank", "store", "encode", "total")
"""The body arrives; JSON to checked fields; waiting for a batch; the model works; events become durable; answer to
JSON; all of it."""


class Record:
    """Times and counts of one request; filled by whoever does a part of the work, see `current`."""

    __slots__ = (
        "answers", "batches", "endpoint", "events", "fallbacks", "key", "last", "request_id", "seconds", "started",
        "status", "trace", "unknown_items", "version",
    )  # fmt: skip

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.started = self.last = perf_counter()
        self.seconds: dict[str, float] = {}
        """By stage."""
        self.status = 500
        self.key: str | None = None
        """Name of the key that was shown."""
        self.request_id = ""
        self.trace: str | None = None
        """Trace id of `traceparent`."""
        self.version: str | None = None
        """Version of the model that answered."""
        self.answers = self.fallbacks = self.unknown_items = self.events = 0
        self.batches: list[int] = []
        """Sizes of the batches that began with this request."""

    def lap(self, stage: str) -> None:
        """What was done since the last lap (or the start) was `stage`."""
        now = perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now

    def skip(self) -> None:
        """What was done since the last lap is counted elsewhere."""
        self.last = perf_counter()

    def longest(self, stage: str, seconds: float) -> None:
        """`stage` took so long, at the same time as others of its kind."""
        self.seconds[stage] = max(seconds, self.seconds.get(stage, 0.0))

    def answered(self, fallback: bool, unknown_items: int) -> None:
        """A list of recommendations was made."""
        self.answers += 1
        self.fallbacks += fallback
        self.unknown_items += unknown_items


_CURRENT: ContextVar[Record] = ContextVar("record")


def begin(endpoint: str) -> Record:
    """A new record, which `current` finds in the task of this request and in those that it starts."""
    record = Record(endpoint)
    _CURRENT.set(record)
    return record


def current() -> Record:
    """The record of the request that is answered; one that nobody reads outside of a request."""
    return _CURRENT.get(None) or Record("none")
