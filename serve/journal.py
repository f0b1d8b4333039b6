"""Journal: the request log, one JSON line for a share of the requests and for every error.

It knows a request by its Record, which holds no id of a user or item and nothing of a body or a path.
"""

import json
import logging
import random
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from serve.record import Record

ERRORS_PER_S = 50
"""Lines of errors a second; a flood of refusals must not fill a disk. How many were left out is told."""
LOGGER = logging.getLogger("seqray.requests")
MODELS_LOGGER = logging.getLogger("seqray.models")
"""Of changes of the models, of versions that fail, and of the shadow's comparisons."""


class Journal:
    """Writes to the logger `seqray.requests`."""

    def __init__(self, sample: float = 0.0, replica: str = "") -> None:
        self._sample, self._replica = sample, replica
        self._second = self._errors = self._left_out = 0

    def note(self, record: Record) -> None:
        """Logs the request when it is an error or drawn."""
        if record.status >= 400:
            if self._is_flood():
                self._left_out += 1
                return
        elif random.random() >= self._sample:
            return
        LOGGER.info(json.dumps(self._line(record), separators=(",", ":")))
        self._left_out = 0

    def _is_flood(self) -> bool:
        second = int(time.monotonic())
        if second != self._second:
            self._second, self._errors = second, 0
        self._errors += 1
        return self._errors > ERRORS_PER_S

    def _line(self, record: Record) -> dict[str, object]:
        line: dict[str, object] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "request_id": record.request_id,
            "trace_id": record.trace,
            "endpoint": record.endpoint,
            "status": record.status,
            "ms": {stage: round(seconds * 1e3, 3) for stage, seconds in record.seconds.items()},
            "model_version": record.version,
            "key": record.key,
            "replica": self._replica,
        }
        if self._left_out:
            line["left_out"] = self._left_out
        return line


def event_line(event: str, fields: Mapping[str, object]) -> str:
    """A line about something that is no request, such as a change of the models."""
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **fields}
    return json.dumps(line, separators=(",", ":"))


def log_to_stdout() -> None:
    """Lets the loggers write to the standard output of this process, which Ray keeps in the logs of its session."""
    # sys.stdout of a replica writes to a log of Ray Serve, each line behind a prefix and a thousand lines late.
    handler = logging.StreamHandler(sys.__stdout__)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for logger in (LOGGER, MODELS_LOGGER):
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
