"""Catalogue: what a model is built for.

Shapes: V items + padding, K distinct lists of categories, C the longest of them, N values of a column (lists laid end
to end).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from seqray.errors import ConfigError
from seqray.model_sections import ItemColumn
from seqray.table_files import as_array, flat_values

IntArray = npt.NDArray[np.int64]

MAX_LIST = 16
"""Of a list of categories the first ones count."""
MANY = 1000
"""A column with more categories than this, and with more than one for two items, tells items apart, not kinds."""


@dataclass(frozen=True)
class ColumnCodes:
    """A column of the item table as rows of an embedding; row 0 stands for no value."""

    lists_KC: Tensor
    """int64: each list of categories that an item has, then zeros; a single value is a list of one."""
    list_V: Tensor
    """int64: which of them an item has; padding, and an item without a value, has one of zeros alone, the first."""
    names: tuple[str, ...]
    """What rows 1, 2, ... stand for, so that two tables can be compared."""


@dataclass(frozen=True)
class Catalogue:
    """The sizes that the log gives a model, and the item table its columns come from."""

    num_items: int
    """Items, padding not counted."""
    items: pa.Table | None = None
    """The item table in index order (row 0 is item_index 1), when there is one."""
    event_types: tuple[str, ...] = ()
    """Event types that the config names: 1, 2, ... of a batch's events; 0 stands for any other."""

    @property
    def num_event_types(self) -> int:
        """Event types, any other not counted."""
        return len(self.event_types)

    def codes(self, wanted: ItemColumn) -> ColumnCodes:
        """A column as buckets or as categories in order of text; of a list of values (also nested) each one counts.

        Nulls, NaN and empty text are no value. ConfigError names a column that is not there or does not fit.
        """
        rows_N, values = flat_values(self._column(wanted.column))
        numbers_or_text = _categories if wanted.buckets is None else _buckets
        try:
            code_N, names = numbers_or_text(values, wanted)
        except pa.ArrowException as error:
            kind = "text" if wanted.buckets is None else "numbers, which buckets need"
            raise ConfigError(
                f"model.item_columns: {wanted.column!r} is {values.type} and cannot be read as {kind}: {error}"
            ) from error
        if len(names) > max(MANY, self.num_items // 2):
            raise ConfigError(
                f"model.item_columns: {wanted.column!r} has {len(names):,} values for {self.num_items:,} items; "
                "a column says what kind an item is (for numbers, set buckets)"
            )
        lists_KC, list_V = np.unique(_table(rows_N, code_N, self.num_items + 1), axis=0, return_inverse=True)
        return ColumnCodes(torch.from_numpy(lists_KC), torch.from_numpy(list_V.reshape(-1)), names)

    def _column(self, name: str) -> pa.Array:
        choices = [] if self.items is None else [n for n in self.items.column_names if n != "item_id"]
        if self.items is None or name not in choices:
            raise ConfigError(
                f"model.item_columns: no column {name!r} in the item table (data.items); "
                f"choices: {', '.join(choices) or 'none'}"
            )
        return as_array(self.items.column(name))


def _categories(values: pa.Array, _: ItemColumn) -> tuple[IntArray, tuple[str, ...]]:
    """(code from 1 of each value, 0 for none; names) by text."""
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    texts = values.cast(pa.large_string())
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    names = pc.drop_null(pc.unique(texts))
    names = names.take(pc.sort_indices(names))
    place = pc.fill_null(pc.index_in(texts, names).cast(pa.int64()), -1)
    return place.to_numpy(zero_copy_only=False) + 1, tuple(names.to_pylist())


def _buckets(values: pa.Array, wanted: ItemColumn) -> tuple[IntArray, tuple[str, ...]]:
    """(code from 1 of each value, 0 for none; names) by place in the sorted column, so that buckets hold about equally
    many items; equal values share the bucket of their middle.
    """
    numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = np.isfinite(numbers)
    count = wanted.buckets or 1
    _, value, size = np.unique(numbers[known], return_inverse=True, return_counts=True)
    middle = (np.cumsum(size) - size / 2) / max(int(known.sum()), 1)
    code = np.zeros(len(numbers), np.int64)
    code[known] = np.floor(middle * count).astype(np.int64)[value] + 1
    return code, tuple(f"{bucket} of {count}" for bucket in range(1, count + 1))


def _table(rows_N: IntArray, code_N: IntArray, V: int) -> IntArray:
    """codes_VC: the first MAX_LIST distinct codes of each item; row 0 of the item table is item_index 1."""
    pairs = (rows_N + 1) * (int(code_N.max(initial=0)) + 1) + code_N
    first = np.sort(np.unique(pairs, return_index=True)[1])
    first = first[code_N[first] > 0]
    item, code = rows_N[first] + 1, code_N[first]
    counts = np.bincount(item, minlength=V)
    place = np.arange(len(item)) - (np.cumsum(counts) - counts)[item]
    stays = place < MAX_LIST
    codes_VC = np.zeros((V, max(1, min(int(counts.max(initial=0)), MAX_LIST))), np.int64)
    codes_VC[item[stays], place[stays]] = code[stays]
    return codes_VC
