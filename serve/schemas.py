"""The JSON of POST /v1/recommend: parsed strictly, with every mistake named by its JSON pointer."""

import difflib
import json
from collections import Counter
from datetime import UTC, datetime
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Tag, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from seqray.recommender import Query
from serve.problems import FieldError, Problem, pointer

MAX_K = 500
MAX_HISTORY = 1000
MAX_EXCLUDED = 1000
MAX_ID_LETTERS = 512
YEAR_5000 = 95_617_584_000
"""Seconds since 1970."""
NOT_BUILT = ("filter", "explain", "deadline_ms")
"""Fields of the API that this version does not know yet; to ignore them would be to answer another question."""

_ID_TAG, _EVENT_TAG = "<id>", "<event>"  # no field can have these names, so they can be told from a path


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


_ID_SCHEMA = {"anyOf": [{"type": "string", "minLength": 1, "maxLength": MAX_ID_LETTERS}, {"type": "integer"}]}
_TIME_SCHEMA = {"anyOf": [{"type": "string", "format": "date-time"}, {"type": "number"}]}
ItemId = Annotated[str | int, PlainValidator(_item_id), WithJsonSchema(_ID_SCHEMA)]
Timestamp = Annotated[float, PlainValidator(_timestamp), WithJsonSchema(_TIME_SCHEMA)]
Name = Annotated[str, Field(min_length=1, max_length=256)]


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
    Annotated[ItemId, Tag(_ID_TAG)] | Annotated[Event, Tag(_EVENT_TAG)],
    Discriminator(lambda value: _EVENT_TAG if isinstance(value, dict) else _ID_TAG),
]


class RecommendRequest(Strict):
    """One context to recommend for."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"history": ["A1", "B2"], "k": 10}]})

    user_id: Name | None = None
    """Accepted, not used for ranking yet."""
    session_id: Name | None = None
    """Accepted, not used for ranking yet."""
    history: list[HistoryEntry] = Field(default_factory=list)
    """Item ids or events, oldest first; of more than 1,000 the newest are kept, with a warning."""
    k: int = Field(20, ge=1, le=MAX_K)
    """Items wanted."""
    exclude_items: list[ItemId] = Field(default_factory=list, max_length=MAX_EXCLUDED)
    """Items never to return, at most 1,000; unknown ones do no harm."""
    exclude_seen: bool | None = None
    """Leave the items of the history out; as the model was evaluated when not given."""
    fallback: Literal["popular", "none"] = "popular"
    """Answer to a history without a known item: the most popular items, or none."""
    include: list[Literal["score", "metadata"]] = ["score"]
    """What is told of each item beside its id, rank and source."""

    def query(self) -> Query:
        """The request as the recommender takes it."""
        history, events, timestamps = zip(*map(_parts, self.history), strict=True) if self.history else ((), (), ())
        return Query(
            history, self.k, tuple(self.exclude_items), self.exclude_seen, self.fallback,
            events if any(events) else (), timestamps if any(t is not None for t in timestamps) else (),
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """What the sender may want to know."""
        times = [entry.timestamp for entry in self.history if isinstance(entry, Event) and entry.timestamp is not None]
        found = []
        if any(later < earlier for earlier, later in pairwise(times)):
            found.append("history: timestamps go back; history is oldest first, and the order of the list was taken")
        if any(moment > YEAR_5000 for moment in times):
            found.append("history: timestamps beyond the year 5000; a number is in seconds, not milliseconds")
        return found


def _parts(entry: str | int | Event) -> tuple[str | int, str | None, float | None]:
    return (entry.item_id, entry.event, entry.timestamp) if isinstance(entry, Event) else (entry, None, None)


class RankedItem(BaseModel):
    """One item of the answer."""

    item_id: str | int
    rank: int = Field(ge=1)
    score: float | None = None
    source: Literal["model", "popular"]
    metadata: dict[str, Any] | None = None


class ModelName(BaseModel):
    """What answered."""

    name: str
    version: str
    variant: Literal["champion"]


class RecommendResponse(BaseModel):
    """The answer, best item first."""

    recommendation_id: str
    model: ModelName
    items: list[RankedItem]
    unknown_items: list[str | int]
    fallback_used: bool
    warnings: list[str]


def parse_request(body: bytes) -> tuple[RecommendRequest, list[str]]:
    """The request of a body and what to warn of; Problem 400 names every field that is wrong."""
    data = _read_json(body)
    if not isinstance(data, dict):
        raise Problem(400, "The body is not a JSON object.", [FieldError("", "not a JSON object")])
    errors = [_unknown(name) for name in data if name not in RecommendRequest.model_fields]
    known = {name: value for name, value in data.items() if name in RecommendRequest.model_fields}
    warnings = []
    history = known.get("history")
    if isinstance(history, list) and len(history) > MAX_HISTORY:
        warnings.append(f"history: of {len(history)} events the newest {MAX_HISTORY} were taken")
        known["history"] = history[-MAX_HISTORY:]
    try:
        request = RecommendRequest.model_validate(known)
    except ValidationError as error:
        errors += _field_errors(error)
    if errors:
        fields = ", ".join(error.pointer or "the body" for error in errors[:3])
        raise Problem(400, f"The request has {len(errors)} invalid field(s): {fields[:200]}", errors)
    return request, warnings + request.warnings()


def _read_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise Problem(400, "The body is not UTF-8.", [FieldError("", f"byte {error.start} is not UTF-8")]) from error
    except RecursionError as error:
        raise Problem(400, "The body is nested too deeply.", [FieldError("", "nested too deeply")]) from error
    except ValueError as error:  # JSONDecodeError, our own two, and whole numbers of thousands of digits
        raise Problem(400, "The body is not JSON.", [FieldError("", str(error))]) from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = Counter(name for name, _ in pairs)
        twice = names.most_common(1)[0][0]
        raise ValueError(f"field {twice!r} is given twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _unknown(name: str) -> FieldError:
    if name in NOT_BUILT:
        return FieldError(pointer([name]), "not supported by this version")
    nearest = difflib.get_close_matches(name[:64], RecommendRequest.model_fields, 1)
    return FieldError(pointer([name]), f"unknown field; nearest: {nearest[0]}" if nearest else "unknown field")


def _field_errors(error: ValidationError) -> list[FieldError]:
    found = error.errors(include_url=False, include_context=False, include_input=False)
    return [FieldError(pointer([p for p in one["loc"] if p not in (_ID_TAG, _EVENT_TAG)]), one["msg"]) for one in found]
