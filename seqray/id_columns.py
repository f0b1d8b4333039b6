"""Columns of ids of any type, as int64 or text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from seqray.errors import DataError
from seqray.table_files import as_array

IntArray = npt.NDArray[np.int64]

CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"
LARGEST_EXACT_FLOAT = 2.0**53


def id_column(column: Any, where: str) -> Any:
    """The ids of one file as an Arrow array of int64 or large_string, null where there is none.

    Integers, and floats that are all whole numbers (pandas' integers with gaps), become int64; everything else
    with a text form becomes text, and the empty text is null. DataError names `where` for any other type.
    """
    values = as_array(column)
    kind = values.type
    if isinstance(kind, pa.UuidType):
        return _uuid_text(values)
    if isinstance(kind, pa.BaseExtensionType):
        return id_column(pa.chunked_array([values.storage]), where)
    if pa.types.is_integer(kind):
        return _integers(values)
    if pa.types.is_floating(kind):
        return _whole_floats(values, where)
    if pa.types.is_boolean(kind) or pa.types.is_nested(kind) or pa.types.is_duration(kind):
        raise DataError(f"{where}: an id is a number or text, this column is {kind}")
    try:
        text = values.cast(pa.large_string())
    except pa.ArrowException as error:
        raise DataError(f"{where}: an id is a number or text, this column is {kind}: {error}") from error
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.large_string()), text)


def encode_ids(parts: Sequence[Any], guess_integers: bool = False) -> tuple[Any, IntArray]:
    """(the distinct ids in ascending order, for each row the position of its id there), of all files' ids.

    Text and integers mixed become text. With `guess_integers` text becomes int64 when every id is a canonical
    integer, so that "007" keeps all ids text. No id may be null.
    """
    kinds = {part.type for part in parts}
    if len(kinds) > 1:
        parts = [part.cast(pa.large_string()) for part in parts]
    encoded = as_array(pa.chunked_array(parts)).dictionary_encode()
    distinct = encoded.dictionary
    if guess_integers and not pa.types.is_integer(distinct.type):
        distinct = _as_integers(distinct)
    order = pc.sort_indices(distinct)
    rank = np.empty(len(distinct), np.int64)
    rank[order.to_numpy()] = np.arange(len(distinct))
    return distinct.take(order), rank[encoded.indices.to_numpy()]


def _as_integers(distinct: Any) -> Any:
    if pc.all(pc.match_substring_regex(distinct, CANONICAL_INTEGER)).as_py():
        try:
            return distinct.cast(pa.int64())
        except pa.ArrowInvalid:
            return distinct  # Nineteen digits that do not fit.
    return distinct


def _integers(values: Any) -> Any:
    try:
        return values.cast(pa.int64())
    except pa.ArrowInvalid:
        return values.cast(pa.large_string())  # uint64 above int64.


def _whole_floats(values: Any, where: str) -> Any:
    values = pc.if_else(pc.is_nan(values.cast(pa.float64())), None, values.cast(pa.float64()))
    numbers = values.drop_null().to_numpy()
    if not bool((np.floor(numbers) == numbers).all() and (np.abs(numbers) < LARGEST_EXACT_FLOAT).all()):
        raise DataError(f"{where}: an id is a whole number or text, this column has fractions or numbers above 2**53")
    return values.cast(pa.int64())


def _uuid_text(values: Any) -> Any:
    raw = values.storage.fill_null(bytes(16)).cast(pa.binary(16))
    data = np.frombuffer(b"".join(raw.to_pylist()).hex().encode("ascii"), np.uint8).reshape(len(values), 32)
    dash = np.full((len(values), 1), ord("-"), np.uint8)
    parts = [data[:, :8], data[:, 8:12], data[:, 12:16], data[:, 16:20], data[:, 20:]]
    joined = np.concatenate([p for part in parts for p in (dash, part)][1:], axis=1)
    text = pa.array(np.ascontiguousarray(joined).view("S36")[:, 0]).cast(pa.large_string())
    return pc.if_else(values.is_valid(), text, pa.scalar(None, pa.large_string()))
