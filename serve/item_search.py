"""ItemSearch: items of a bundle by their id and by what their texts say, whatever the case and the accents."""

import re
import threading
import unicodedata
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

ACCENTS = re.compile("[\u0300-\u036f\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+")
SEARCHED_LETTERS = 400
"""Of each text column: titles and categories whole, of a description the beginning."""

Mask = npt.NDArray[np.bool_]


class ItemSearch:
    """Finds rows of an item table; its texts are read at the first query, so that nobody else pays for it.

    That takes a second or two for 100,000 items, a query then some milliseconds. Safe in several threads.
    """

    def __init__(self, items: Any) -> None:
        """items: the item table of a bundle."""
        self._items = items
        self._words: _Words | None = None
        self._lock = threading.Lock()

    def rows(self, query: str, limit: int) -> tuple[list[int], int]:
        """Rows of the item table that hold every word of `query`, at most `limit` of them, and how many do.

        An item whose id is the query comes first, then those in which the words begin a word; among equals the more
        popular one. Without a word in it: the most popular items.
        """
        with self._lock:
            if self._words is None:
                self._words = _Words(self._items)
        return self._words.rows(fold(query).split(), limit)


class _Words:
    """The words of all items with the items that hold each, the most popular first; a query scans the words alone."""

    def __init__(self, items: Any) -> None:
        self._rows = np.argsort(-items.column("train_events").to_numpy().astype(np.int64), kind="stable")
        columns = [name for name in items.column_names if name == "item_id" or _is_text(items.schema.field(name).type)]
        texts = [_text(items.column(name).combine_chunks().take(pa.array(self._rows))) for name in columns]
        joined = pc.binary_join_element_wise(*texts, pa.scalar(" ", pa.large_string()))
        self._ids = _folded(texts[0])
        words = pc.utf8_split_whitespace(_folded(joined))
        parents = pc.list_parent_indices(words).to_numpy(zero_copy_only=False)
        encoded = words.flatten().dictionary_encode()
        self._words = encoded.dictionary
        numbers = encoded.indices.to_numpy(zero_copy_only=False)
        self._places = parents[np.argsort(numbers, kind="stable")].astype(np.int32)
        self._ends = np.cumsum(np.bincount(numbers, minlength=len(self._words)))

    def rows(self, words: list[str], limit: int) -> tuple[list[int], int]:
        if not words:
            return self._rows[:limit].tolist(), len(self._rows)
        within, begins = np.ones(len(self._rows), bool), np.ones(len(self._rows), bool)
        for word in words:
            within &= self._holding(pc.match_substring(self._words, word))
            begins &= self._holding(pc.starts_with(self._words, word))
        found = np.flatnonzero(within)
        same = pc.equal(self._ids, " ".join(words)).to_numpy(zero_copy_only=False)
        order = np.lexsort((~begins[found], ~same[found]))  # stable, so that popularity decides among equals
        return self._rows[found[order[:limit]]].tolist(), len(found)

    def _holding(self, chosen: Any) -> Mask:
        """Which items hold one of the chosen words."""
        words = np.flatnonzero(chosen.to_numpy(zero_copy_only=False))
        ends = self._ends[words]
        counts = ends - np.where(words > 0, self._ends[words - 1], 0)
        first = ends - np.cumsum(counts)  # from a place in the concatenation of the words' ranges to one in _places
        holding = np.zeros(len(self._rows), bool)
        holding[self._places[np.repeat(first, counts) + np.arange(counts.sum())]] = True
        return holding


def fold(text: str) -> str:
    """`text` without accents and case: Crème BRÛLÉE and creme brulee are the same."""
    plain = ACCENTS.sub("", unicodedata.normalize("NFKD", text))
    return unicodedata.normalize("NFKD", plain.casefold())


def _folded(texts: Any) -> Any:
    # One long string: a call for each text would take longer than all the folding.
    return pa.array(
        fold("\n".join(" ".join(text.split()) for text in texts.to_pylist())).split("\n"), pa.large_string()
    )


def _text(column: Any) -> Any:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return pc.utf8_slice_codeunits(column.cast(pa.large_string()).fill_null(""), 0, SEARCHED_LETTERS)


def _is_text(kind: Any) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))
