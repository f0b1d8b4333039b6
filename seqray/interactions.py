"""Interactions: the events of the log as parallel arrays, put in order, thinned and divided among users.

Shapes: U users, I items, E events.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Interactions:
    """Who did something with which item and when, as positions in the lists of ids."""

    user_ids: Any
    """Arrow array of U distinct ids, ascending."""
    item_ids: Any
    """Arrow array of I distinct ids, ascending."""
    users_E: IntArray
    """Position in user_ids."""
    items_E: IntArray
    """Position in item_ids."""
    timestamps_E: IntArray
    """Microseconds since 1970, or positions in the log where it has no times."""
    baskets_E: IntArray | None = None
    """Code of the basket; after `ordered`, runs of equal codes of one user are its baskets."""
    event_types_E: npt.NDArray[np.int8] | None = None
    """Place in `data.event_types`, from 1; 0 for any other."""

    def __len__(self) -> int:
        """Number of events."""
        return len(self.users_E)

    def ordered(self, tie_E: IntArray | None = None) -> Self:
        """Users ascending, each one's events by time; equal times ascend by `tie_E`, then stay in the given order.

        With baskets an event counts as happening when its basket began, so that a basket's events stay together;
        an event without a basket (code -1) belongs to the events without one of the same user and time.
        """
        tie = () if tie_E is None else (tie_E,)
        if self.baskets_E is None:
            return self._take(np.lexsort((*tie, self.timestamps_E, self.users_E)))
        baskets, start, first = self._user_baskets(self.baskets_E)
        moved = replace(self, timestamps_E=start[baskets], baskets_E=baskets)
        return moved._take(np.lexsort((*tie, first[baskets], start[baskets], self.users_E)))

    def _user_baskets(self, codes_E: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        # (basket of each event; begin and first row of each basket), a basket being a user's rows of one code.
        alone = codes_E < 0
        code = codes_E.copy()
        if alone.any():
            times = np.unique(self.timestamps_E[alone], return_inverse=True)[1]
            code[alone] = codes_E.max(initial=-1) + 1 + times
        pairs = self.users_E * (int(code.max(initial=0)) + 1) + code
        _, first, baskets = np.unique(pairs, return_index=True, return_inverse=True)
        start = np.full(len(first), np.iinfo(np.int64).max)
        np.minimum.at(start, baskets, self.timestamps_E)
        return baskets, start, first

    def without_items(self, item_ids: Sequence[str]) -> Self:
        """The events of all other items; ids are compared by their text."""
        dropped = pc.is_in(self.item_ids.cast(pa.large_string()), pa.array(item_ids, pa.large_string()))
        return self._take(np.flatnonzero(~np.asarray(dropped, dtype=np.bool_)[self.items_E]))

    def without_repeats(self, within: Literal["user", "basket"] = "user") -> Self:
        """Only the first event with an item of a user, or of each basket, of ordered events."""
        group = self.users_E if within == "user" else self.basket_ends()
        pairs = group * max(len(self.item_ids), 1) + self.items_E
        return self._take(np.sort(np.unique(pairs, return_index=True)[1]))

    def filtered(self, min_user_events: int, min_item_events: int, how: Literal["k_core", "one_pass"]) -> Self:
        """Users and items with at least so many events.

        `k_core` repeats both minimums until nothing changes; `one_pass` applies items once, then users once.
        """
        kept = np.arange(len(self))
        while True:
            users, items = self.users_E[kept], self.items_E[kept]
            stay = np.bincount(items, minlength=1)[items] >= min_item_events
            if how == "one_pass":
                kept, users = kept[stay], users[stay]
                return self._take(kept[np.bincount(users, minlength=1)[users] >= min_user_events])
            stay &= np.bincount(users, minlength=1)[users] >= min_user_events
            if stay.all():
                return self._take(kept)
            kept = kept[stay]

    def compacted(self) -> Self:
        """The same events, without the ids that have none."""
        users, users_E = np.unique(self.users_E, return_inverse=True)
        items, items_E = np.unique(self.items_E, return_inverse=True)
        return replace(
            self,
            user_ids=self.user_ids.take(users),
            item_ids=self.item_ids.take(items),
            users_E=users_E,
            items_E=items_E,
        )

    def offsets(self) -> IntArray:
        """U + 1 positions: events of user u are offsets[u] to offsets[u + 1], of ordered events."""
        counts = np.bincount(self.users_E, minlength=len(self.user_ids))
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])

    def basket_ends(self) -> IntArray:
        """For each of the ordered events the position after the last event of its basket.

        Without baskets, the events of a user at one time are a basket.
        """
        group = self.timestamps_E if self.baskets_E is None else self.baskets_E
        new = (group[1:] != group[:-1]) | (self.users_E[1:] != self.users_E[:-1])
        ends = np.append(np.flatnonzero(new) + 1, len(self))
        return np.repeat(ends, np.diff(ends, prepend=0))

    def _take(self, rows: IntArray) -> Self:
        return replace(
            self,
            users_E=self.users_E[rows],
            items_E=self.items_E[rows],
            timestamps_E=self.timestamps_E[rows],
            baskets_E=None if self.baskets_E is None else self.baskets_E[rows],
            event_types_E=None if self.event_types_E is None else self.event_types_E[rows],
        )


def shuffled_ties(events: int, seed: int) -> IntArray:
    """A random rank for each event, for `Interactions.ordered`: a pure function of its arguments."""
    return np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(events)
