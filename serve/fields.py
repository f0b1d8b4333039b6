"""The fields that requests of the API have in common, checked strictly: nothing coerced, nothing unknown."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, WithJsonSchema, WrapValidator
from pydantic_core import PydanticCustomError

MAX_ID_LETTERS = 512
MAX_NAME_LETTERS = 256

ID_TAG, EVENT_TAG = "<id>", "<event>"
"""Steps of pydantic's paths that are no fields; no field can have these names."""


def _item_id(value: Any) -> str | int:
    if type(value) is int:
        if abs(value) >= 2**63:
            raise PydanticCustomError("item_id", "a number as item id has 64 bits at the most")
        return value
    if type(value) is not str:
        raise PydanticCustomError("item_id", "an item id is a string or a whole number")
    if not 1 <= len(value) <= MAX_ID_LETTERS:
        raise PydanticCustomError("item_id", f"an item id has 1 to {MAX_ID_LETTERS} characters")
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise PydanticCustomError("item_id", "an item id is valid Unicode; this has half of a surrogate pair")
    return value


def _timestamp(value: Any) -> float:
    if type(value) in (int, float) and abs(value) < 1e15:
        return float(value)
    if type(value) is str and len(value) <= 64:
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            pass
        else:
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    raise PydanticCustomError("timestamp", "a timestamp is ISO 8601 text or seconds since 1970")


_ID_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1, "maxLength": MAX_ID_LETTERS},
        {"type": "integer", "minimum": 1 - 2**63, "maximum": 2**63 - 1},
    ]
}
_TIME_SCHEMA = {
    "anyOf": [
        {"type": "string", "format": "date-time"},
        {"type": "number", "exclusiveMinimum": -1e15, "exclusiveMaximum": 1e15},
    ]
}
ItemId = Annotated[str | int, PlainValidator(_item_id), WithJsonSchema(_ID_SCHEMA)]
Timestamp = Annotated[float, PlainValidator(_timestamp), WithJsonSchema(_TIME_SCHEMA)]
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_LETTERS)]


class Strict(BaseModel):
    """Types as they are in JSON, nothing coerced, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, use_attribute_docstrings=True)


class Event(Strict):
    """One event of a history."""

    item_id: ItemId
    event: Name | None = None
    """What happened, such as view or purchase, for models that read it; one that a model does not know is no error."""
    timestamp: Timestamp | None = None
    """When, for models that read it; they do when each event that they read has one. The order of the list is the
    order of the history."""


HistoryEntry = Annotated[
    Annotated[ItemId, Tag(ID_TAG)] | Annotated[Event, Tag(EVENT_TAG)],
    Discriminator(lambda value: EVENT_TAG if isinstance(value, dict) else ID_TAG),
]


def are_text_ids(value: Any, longest: int) -> bool:
    """Whether this is a list of 1 to `longest` ids of plain text, the usual case; told by few calls for the whole list.

    Half of a surrogate pair is no plain text.
    """
    if type(value) is not list or not 0 < len(value) <= longest or "" in value:
        return False
    try:
        text = "".join(value)
    except TypeError:  # something else than text
        return False
    return text.isascii() and (len(text) <= MAX_ID_LETTERS or max(map(len, value)) <= MAX_ID_LETTERS)


def text_ids_first(longest: int) -> WrapValidator:
    """A list of ids that is right without going through pydantic."""

    def first(value: Any, check: Callable[[Any], Any]) -> Any:
        return value if are_text_ids(value, longest) else check(value)

    return WrapValidator(first)


def example(request: dict[str, Any]) -> ConfigDict:
    """The configuration of a request that shows an example in the OpenAPI document."""
    return ConfigDict(json_schema_extra={"examples": [request]})
