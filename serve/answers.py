"""The answers of the API: their form for the OpenAPI document, and how a Recommendation becomes one."""

import time
from collections.abc import Sequence
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field

from seqray.recommender import Influence, Recommendation
from serve.bodies import plain
from serve.request_id import chance
from serve.served_model import ServedModel, Variant

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
PAIRS = [high + low for high in CROCKFORD for low in CROCKFORD]


class Reason(BaseModel):
    """An event of the history that drove an item."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    item_id: str | int
    position: int = Field(ge=0)
    """Index into the `history` of the request."""
    effect: float | None
    """By how much the score falls without the event; null when it is the only one that the model reads."""


class RankedItem(BaseModel):
    """One item of the answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    item_id: str | int
    rank: int = Field(ge=1)
    score: float | None = None
    """The model's score, the cosine of similar items, or the training events of a popular item."""
    source: Literal["model", "popular"]
    metadata: dict[str, Any] | None = None
    """The columns of the item table."""
    explanation: list[Reason] | None = None
    """The events without which the score falls most, at most 5, of the newest 50."""


class ModelName(BaseModel):
    """What answered."""

    name: str
    version: str
    variant: Variant


class RecommendResponse(BaseModel):
    """The answer, best item first."""

    recommendation_id: str
    model: ModelName
    items: list[RankedItem]
    unknown_items: list[str | int]
    fallback_used: bool
    warnings: list[str]


class BatchResult(BaseModel):
    """One of the two."""

    result: RecommendResponse | None = None
    problem: dict[str, Any] | None = None


class BatchResponse(BaseModel):
    """A result or a problem for each request, in their order."""

    results: list[BatchResult]


def recommendation(
    model: ServedModel, found: Recommendation, include: Sequence[str], warnings: Sequence[str], dropped: int = 0
) -> dict[str, Any]:
    """A RecommendResponse. `dropped`: events at the beginning of the request's history that were not taken."""
    if found.items_json is not None:
        return _response(model, found, orjson.Fragment(found.items_json), warnings)
    items: list[dict[str, Any]]
    if "score" in include:
        items = [
            {"item_id": _plain_id(item_id), "rank": rank, "score": score, "source": source}
            for rank, (item_id, score, source) in enumerate(found.items, start=1)
        ]
    else:
        items = [
            {"item_id": _plain_id(item_id), "rank": rank, "source": source}
            for rank, (item_id, _, source) in enumerate(found.items, start=1)
        ]
    if "metadata" in include:
        for shown, values in zip(items, model.recommender.metadata(item.item_id for item in found.items), strict=True):
            shown["metadata"] = plain(values)
    for shown, reasons in zip(items, found.explanations, strict=False):
        shown["explanation"] = [_reason(reason, dropped) for reason in reasons]
    return _response(model, found, items, warnings)


def _response(model: ServedModel, found: Recommendation, items: Any, warnings: Sequence[str]) -> dict[str, Any]:
    return {
        "recommendation_id": new_recommendation_id(),
        "model": model.about,
        "items": items,
        "unknown_items": found.unknown_items,
        "fallback_used": found.fallback_used,
        "warnings": warnings,
    }


def new_recommendation_id() -> str:
    """rec_ and a ULID: 48 bits of milliseconds and 80 random ones, so that ids sort by time."""
    number = (time.time_ns() // 1_000_000 << 80) | chance.getrandbits(80)
    return "rec_" + "".join([PAIRS[number >> shift & 1023] for shift in range(120, -1, -10)])


def _reason(reason: Influence, dropped: int) -> dict[str, Any]:
    place, item_id, effect = reason
    return {"item_id": _plain_id(item_id), "position": place + dropped, "effect": effect}


def _plain_id(item_id: Any) -> str | int:
    return item_id if type(item_id) is str or isinstance(item_id, int) else str(item_id)
