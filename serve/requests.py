"""The requests of the API, and what each asks the recommender."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from seqray.item_filter import Filter, FilterError
from seqray.recommender import Query, Recommender, SimilarQuery
from serve.bodies import Path, invalid, parse
from serve.fields import Event, HistoryEntry, ItemId, Name, Strict, example, text_ids_first
from serve.problems import FieldError, pointer

MAX_K = 500
MAX_HISTORY = 1000
MAX_EXCLUDED = 1000
MAX_CANDIDATES = 1000
MAX_BATCH = 64
MAX_EXPLAINED_ITEMS = 100
MAX_DEADLINE_MS = 60_000
YEAR_5000 = 95_617_584_000
"""Seconds since 1970."""

FilterJson = Any
"""Read by `Recommender.read_filter`, which knows the columns."""
Include = list[Literal["score", "metadata"]]
Fallback = Literal["popular", "none"]
ExcludedItems = Annotated[list[ItemId], Field(max_length=MAX_EXCLUDED), text_ids_first(MAX_EXCLUDED)]
Candidates = Annotated[list[ItemId], Field(min_length=1, max_length=MAX_CANDIDATES), text_ids_first(MAX_CANDIDATES)]
DeadlineMs = Annotated[int, Field(ge=1, le=MAX_DEADLINE_MS)]


class Context(Strict):
    """Who is there, and what they did."""

    is_recommendation: ClassVar[bool] = False
    """Whether the shadow is asked the same."""

    user_id: Name | None = None
    """Chooses the model in a canary release, always the same one; not used for ranking."""
    session_id: Name | None = None
    """In the place of `user_id` where that is not given."""
    history: Annotated[list[HistoryEntry], text_ids_first(MAX_HISTORY)] = Field(default_factory=list)
    """Item ids or events, oldest first; of more than 1,000 the newest are kept, with a warning."""
    fallback: Fallback = "popular"
    """Answer to a history without a known item: the most popular items, or none."""
    include: Include = Field(["score"])
    """What is told of each item beside its id, rank and source."""
    deadline_ms: DeadlineMs | None = None
    """Milliseconds after which nobody waits any more: 504, and the work is dropped. Not given: the server's."""

    def asked(self, recommender: Recommender, path: Path = ()) -> Query:
        """What the recommender is asked. Problem 400 when it does not fit the items of the model; `path`: where in the
        body the request was."""
        raise NotImplementedError

    @property
    def who(self) -> str | None:
        """Whose context it is."""
        return self.user_id or self.session_id

    @property
    def has_events(self) -> bool:
        """Whether the history holds more than item ids."""
        return Event in set(map(type, self.history))

    def query(self) -> Query:
        """The history as the recommender takes it."""
        if not self.has_events:
            return Query(tuple(self.history), fallback=self.fallback)
        ids, events, timestamps = zip(*map(_parts, self.history), strict=True)
        return Query(
            ids, fallback=self.fallback, events=events if any(events) else (),
            timestamps=timestamps if any(t is not None for t in timestamps) else (),
        )  # fmt: skip

    def warnings(self) -> list[str]:
        """What the sender may want to know."""
        if not self.has_events:
            return []
        times = [entry.timestamp for entry in self.history if isinstance(entry, Event) and entry.timestamp is not None]
        found = []
        if any(later < earlier for earlier, later in pairwise(times)):
            found.append("history: timestamps go back; history is oldest first, and the order of the list was taken")
        if any(moment > YEAR_5000 for moment in times):
            found.append("history: timestamps beyond the year 5000; a number is in seconds, not milliseconds")
        return found


class RecommendRequest(Context):
    """One context to recommend for."""

    model_config = example({"history": ["A1", "B2"], "k": 10})
    is_recommendation = True

    k: int = Field(20, ge=1, le=MAX_K)
    """Items wanted."""
    exclude_items: ExcludedItems = Field(default_factory=list)
    """Items never to return, at most 1,000; unknown ones do no harm."""
    exclude_seen: bool | None = None
    """Leave the items of the history out; as the model was evaluated when not given."""
    filter: FilterJson = None
    """Only items whose columns meet it."""
    explain: bool = False
    """Tell of each item which events of the history drove it."""

    def asked(self, recommender: Recommender, path: Path = ()) -> Query:
        """See Context."""
        return replace(
            self.query(), k=self.k, exclude_items=tuple(self.exclude_items), exclude_seen=self.exclude_seen,
            filter=_filter(recommender, self.filter, path), explain=self.explain,
        )  # fmt: skip


class BatchRequest(Strict):
    """Several contexts, each answered by itself."""

    model_config = example({"requests": [{"history": ["A1"], "k": 3}, {"user_id": "u2", "k": 3}]})

    requests: list[Any] = Field(min_length=1, max_length=MAX_BATCH)
    """1 to 64 requests as those of /v1/recommend."""


class SimilarItemsRequest(Strict):
    """One item to find its like."""

    model_config = example({"item_id": "A1", "k": 10})

    item_id: ItemId
    """The item; an unknown one is answered by the fallback."""
    k: int = Field(20, ge=1, le=MAX_K)
    """Items wanted."""
    exclude_items: ExcludedItems = Field(default_factory=list)
    """Items never to return, at most 1,000."""
    filter: FilterJson = None
    """Only items whose columns meet it."""
    fallback: Fallback = "popular"
    """Answer to an unknown item: the most popular items, or none."""
    include: Include = Field(["score"])
    """What is told of each item beside its id, rank and source."""
    deadline_ms: DeadlineMs | None = None
    """Milliseconds after which nobody waits any more."""

    def asked(self, recommender: Recommender) -> SimilarQuery:
        """The query; Problem 400 when the filter does not fit the items of the model."""
        chosen = _filter(recommender, self.filter, ())
        return SimilarQuery(self.item_id, self.k, tuple(self.exclude_items), self.fallback, chosen)


class RankRequest(Context):
    """Given candidates to order for a context."""

    model_config = example({"history": ["A1", "B2"], "candidates": ["C3", "D4", "E5"]})

    candidates: Candidates
    """1 to 1,000 items; those of the history may be among them. One that stands there twice is ranked once."""
    explain: bool = False
    """Tell of each item which events of the history drove it."""

    def asked(self, recommender: Recommender, path: Path = ()) -> Query:
        """See Context."""
        del recommender, path
        return replace(
            self.query(),
            k=len(self.candidates),
            candidates=tuple(self.candidates),
            exclude_seen=False,
            explain=self.explain,
        )


class ExplainRequest(Context):
    """Items to explain by the events of a context."""

    model_config = example({"history": ["A1", "B2"], "items": ["C3"]})

    items: list[ItemId] | None = Field(None, min_length=1, max_length=MAX_EXPLAINED_ITEMS)
    """1 to 100 items; the recommended ones when not given."""
    k: int | None = Field(None, ge=1, le=MAX_EXPLAINED_ITEMS)
    """How many of the recommended ones, 10 when not given; not together with `items`."""

    @model_validator(mode="after")
    def _items_or_k(self) -> Self:
        if self.items is not None and self.k is not None:
            raise PydanticCustomError("items_or_k", "k is for recommended items; items are given")
        return self

    def asked(self, recommender: Recommender, path: Path = ()) -> Query:
        """See Context."""
        del recommender, path
        if self.items is None:
            return replace(self.query(), k=self.k or 10, explain=True)
        return replace(self.query(), k=len(self.items), candidates=tuple(self.items), exclude_seen=False, explain=True)


class UsualRequest:
    """A RecommendRequest of a few plain fields, see `serve.usual`; the others are as when they are not given."""

    __slots__ = ("_query", "deadline_ms", "who")
    include = ("score",)
    is_recommendation = True

    def __init__(self, query: Query, who: str | None, deadline_ms: int | None) -> None:
        self._query, self.who, self.deadline_ms = query, who, deadline_ms

    def asked(self, recommender: Recommender, path: Path = ()) -> Query:
        """See Context."""
        del recommender, path
        return self._query


class Read(NamedTuple):
    """A context that was read, and what was done to it."""

    context: Context | UsualRequest
    dropped: int
    """Events at the beginning of the history that were not taken."""
    warnings: list[str]


def read_context(kind: type[Context], data: Any, path: Path = ()) -> Read:
    """The request that JSON data says; Problem 400 names what is wrong. `path`: where in the body it was."""
    dropped, warnings = 0, []
    if isinstance(data, dict) and isinstance(history := data.get("history"), list) and len(history) > MAX_HISTORY:
        warnings.append(f"history: of {len(history)} events the newest {MAX_HISTORY} were taken")
        dropped = len(history) - MAX_HISTORY
        data = {**data, "history": history[-MAX_HISTORY:]}
    context = parse(kind, data, path)
    return Read(context, dropped, warnings + context.warnings())


def _filter(recommender: Recommender, data: Any, path: Sequence[str | int]) -> Filter | None:
    if data is None:
        return None
    try:
        return recommender.read_filter(data)
    except FilterError as error:
        raise invalid([FieldError(pointer([*path, "filter", *error.path]), error.detail)]) from error


def _parts(entry: str | int | Event) -> tuple[str | int, str | None, float | None]:
    return (entry.item_id, entry.event, entry.timestamp) if isinstance(entry, Event) else (entry, None, None)
