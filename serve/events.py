"""POST /v1/events: what users did, and what they were shown, kept as a log to train on."""

import time
from collections.abc import Sequence
from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from serve.bodies import answer, answer_headers, invalid, parse, read_json
from serve.event_table import Row
from serve.fields import ItemId, Name, Strict, Timestamp
from serve.problems import FieldError, Problem, pointer
from serve.record import current
from serve.service import Service

MAX_EVENTS = 500
DAY_S = 86_400.0
ROW_BYTES = 300
"""Of an event in the buffer, beside its texts."""

Number = Annotated[float, Field(allow_inf_nan=False)]


class LoggedEvent(Strict):
    """One event; it names a user or a session."""

    event_id: str = Field(min_length=1, max_length=128)
    """Of the sender's making, such as a UUID; an event that is sent again under the same id counts once."""
    item_id: ItemId
    event: Name
    """What happened: view, cart, purchase, impression, click or any other word."""
    timestamp: Timestamp | None = None
    """When it happened; the time of arrival when not given."""
    user_id: Name | None = None
    session_id: Name | None = None
    recommendation_id: Name | None = None
    """Of the answer of recommend that showed the item."""
    model_version: Name | None = None
    """`model.version` of that answer."""
    variant: Name | None = None
    """`model.variant` of that answer."""
    rank: int | None = Field(None, ge=1, le=100_000)
    """The item's rank in that answer."""
    value: Number | None = None
    """Any number that goes with the event, such as a rating or seconds watched."""
    quantity: Number | None = None
    price: Number | None = None
    """Of one piece."""

    @model_validator(mode="after")
    def _is_somebodys(self) -> "LoggedEvent":
        if self.user_id is None and self.session_id is None:
            raise PydanticCustomError("nobody", "user_id or session_id is needed")
        return self

    def row(self, now: float) -> Row:
        """The event as the log keeps it; now: seconds since 1970."""
        moment = now if self.timestamp is None else self.timestamp
        return {
            **dict(self),
            "item_id": str(self.item_id),
            "history_id": self.user_id or self.session_id,
            "timestamp": round(moment * 1e6),
            "received": round(now * 1e6),
        }


class EventsRequest(Strict):
    """Events of any users, at most 500."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "events": [
                        {
                            "event_id": "0b9c4f5e-1", "user_id": "u42", "item_id": "C3", "event": "click",
                            "recommendation_id": "rec_01KAXQ", "model_version": "17", "variant": "champion", "rank": 1,
                        }
                    ]
                }
            ]
        }
    )  # fmt: skip

    events: list[LoggedEvent] = Field(min_length=1, max_length=MAX_EVENTS)


class EventsResponse(Strict):
    """All events of the request are kept."""

    accepted: int
    """New ones."""
    duplicates: int
    """Ones that were there before, or twice in the request."""


async def record(service: Service, request: Request) -> Response:
    """Answers 202 when the events are durable."""
    if service.events is None:
        raise Problem(404, "No events are taken here; set serve.events.folder to the folder that they go to.")
    asked = parse(EventsRequest, await read_json(request))
    now = time.time()
    _check_times(asked.events, now, service.events.config.max_age_days)
    rows = [event.row(now) for event in asked.events]
    receipt = await service.events.add(rows, _size(rows))
    current().lap("store")
    current().events = receipt.accepted
    return answer(receipt._asdict(), answer_headers(), 202)


def _check_times(events: Sequence[LoggedEvent], now: float, max_age_days: float) -> None:
    """Problem 400 for times that are no times of now: each day has a folder, and seconds are not milliseconds."""
    oldest, newest = now - max_age_days * DAY_S, now + DAY_S
    errors = [
        FieldError(pointer(["events", place, "timestamp"]), f"not within {max_age_days:g} days before and 1 after now")
        for place, event in enumerate(events)
        if event.timestamp is not None and not oldest <= event.timestamp <= newest
    ]
    if errors:
        raise invalid(errors)


def _size(rows: Sequence[Row]) -> int:
    return sum(ROW_BYTES + sum(len(value) for value in row.values() if isinstance(value, str)) for row in rows)
