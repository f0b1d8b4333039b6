"""Query in, Recommendation out: what the Recommender is asked and what it answers, in the ids of the shop."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from seqray.item_filter import Filter

Source = Literal["model", "popular"]


@dataclass(frozen=True, slots=True)
class Query:
    """One history to continue: item ids, oldest first; the newest `max_length` of the model are read."""

    history: tuple[Hashable, ...]
    k: int = 20
    exclude_items: tuple[Hashable, ...] = ()
    exclude_seen: bool | None = None
    """Leave the history's items out; None: as the bundle was evaluated."""
    fallback: Literal["popular", "none"] = "popular"
    """Answer to a history without a known item: most popular items, or an empty list."""
    events: tuple[str | None, ...] = ()
    """What happened at each event of the history; empty: not known. Other values than the bundle's are as None."""
    timestamps: tuple[float | None, ...] = ()
    """When each event happened, seconds since 1970; empty: not known. They count when every event read has one."""
    now: float | None = None
    """Time of the query, seconds since 1970; None: the present moment."""
    filter: Filter | None = None
    """Only items that it lets through; see `Recommender.read_filter`."""
    candidates: tuple[Hashable, ...] | None = None
    """Only these items; None: the whole catalogue."""
    explain: bool = False
    """Also tell which events of the history drove each item."""
    as_json: bool = False
    """The items may come as `items_json`: they do where a kernel can write it."""

    def __post_init__(self) -> None:
        """ValueError when `events` or `timestamps` are not parallel to the history."""
        for name, values in (("events", self.events), ("timestamps", self.timestamps)):
            if values and len(values) != len(self.history):
                raise ValueError(f"{name} has {len(values)} values for {len(self.history)} events of the history")


@dataclass(frozen=True, slots=True)
class SimilarQuery:
    """One item to find its like: by the cosine of the vectors that the model ranks items with."""

    item_id: Hashable
    k: int = 20
    exclude_items: tuple[Hashable, ...] = ()
    fallback: Literal["popular", "none"] = "popular"
    """Answer to an unknown item: most popular items, or an empty list."""
    filter: Filter | None = None
    """Only items that it lets through."""


class Influence(NamedTuple):
    """An event of the history, and by how much the score of an item falls without it."""

    place: int
    """Index into the history of the query."""
    item_id: Any
    effect: float | None
    """None when it is the only event that the model reads, so that nothing is left without it."""


class RankedItem(NamedTuple):
    """One recommended item; the score is the model's, or the training events of a popular item."""

    item_id: Any
    score: float
    source: Source


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The answer to a Query, best item first; fewer than k when fewer items are left."""

    items: tuple[RankedItem, ...]
    unknown_items: tuple[Hashable, ...] = ()
    """Ids of the history and of the candidates that the bundle does not know, each once."""
    fallback_used: bool = False
    """No item of the history was known."""
    explanations: tuple[tuple[Influence, ...], ...] = ()
    """Of each item, when the query asked for them: the events that raised its score, the strongest first."""
    items_json: bytes | None = None
    """The items as a JSON array of objects with item_id, rank, score and source, in the place of `items`."""
