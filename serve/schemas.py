"""The requests and answers of the API."""

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from seqray.recommender import Query
from serve.bodies import parse
from serve.fields import Event, HistoryEntry, ItemId, Name, Strict

MAX_K = 500
MAX_HISTORY = 1000
MAX_EXCLUDED = 1000
YEAR_5000 = 95_617_584_000
"""Seconds since 1970."""


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
    include: list[Literal["score", "metadata"]] = Field(["score"])
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


def parse_recommend(data: Any) -> tuple[RecommendRequest, list[str]]:
    """The request of a body and what to warn of; Problem 400 names every field that is wrong."""
    warnings = []
    if isinstance(data, dict) and isinstance(history := data.get("history"), list) and len(history) > MAX_HISTORY:
        warnings.append(f"history: of {len(history)} events the newest {MAX_HISTORY} were taken")
        data = {**data, "history": history[-MAX_HISTORY:]}
    request = parse(RecommendRequest, data)
    return request, warnings + request.warnings()
