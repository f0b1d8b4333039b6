"""Columns of times of any kind, as microseconds since 1970."""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from seqray.errors import DataError
from seqray.table_files import as_array

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
Unit = Literal["s", "ms", "us", "ns"]

MICROSECONDS = {"s": Fraction(1_000_000), "ms": Fraction(1000), "us": Fraction(1), "ns": Fraction(1, 1000)}
DAY = Fraction(86_400_000_000)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
PLAIN_FORMAT = re.compile(r"([^%]|%[YmdHMS])*")
WHOLE_NUMBER = r"^-?[0-9]{1,18}$"
NUMBER = r"^-?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?$"


def time_column(column: Any, unit: Unit, format_: str | None, where: str) -> tuple[IntArray, BoolArray]:
    """(microseconds since 1970, where a row has a time) of one file's column.

    Times without a zone are UTC. Numbers, also as text, are in `unit`; text is ISO 8601, or `format_` (strptime).
    False where there is none, it is not finite, or it cannot be read. DataError names `where` for any other type.
    """
    values = as_array(column)
    kind = values.type
    if pa.types.is_null(kind):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    if pa.types.is_large_string(kind):
        return _from_text(values, unit, format_)
    if pa.types.is_timestamp(kind):
        return _from_integers(values.cast(pa.int64()), MICROSECONDS[kind.unit])
    if pa.types.is_date(kind):
        return _from_integers(values.cast(pa.date32()).cast(pa.int32()), DAY)
    if pa.types.is_signed_integer(kind):
        return _from_integers(values, MICROSECONDS[unit])
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_unsigned_integer(kind):
        return _from_floats(values, MICROSECONDS[unit])
    raise DataError(f"{where}: a time is a number, a date or text, this column is {kind}")


def _from_integers(values: Any, factor: Fraction) -> tuple[IntArray, BoolArray]:
    raw = values.cast(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    largest = int(2**63 / factor) - 1 if factor > 1 else 2**63 - 1
    valid = np.asarray(values.is_valid()) & (np.abs(raw) <= largest) & (raw != np.iinfo(np.int64).min)
    return np.where(valid, raw, 0) * factor.numerator // factor.denominator, valid


def _from_floats(values: Any, factor: Fraction) -> tuple[IntArray, BoolArray]:
    if pa.types.is_unsigned_integer(values.type):
        try:
            return _from_integers(values.cast(pa.int64()), factor)
        except pa.ArrowInvalid:
            pass
    raw = values.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    valid = np.isfinite(raw) & (np.abs(raw) < 2.0**62 / float(factor))
    finite = np.where(valid, raw, 0.0)
    # Whole part and fraction apart: multiplied at once, seconds of today lose their last microseconds.
    whole = np.floor(finite)
    scaled = whole.astype(np.int64) * factor.numerator // factor.denominator
    return scaled + np.rint((finite - whole) * float(factor)).astype(np.int64), valid


def _from_text(values: Any, unit: Unit, format_: str | None) -> tuple[IntArray, BoolArray]:
    encoded = values.dictionary_encode()
    distinct = encoded.dictionary
    if format_ is not None:
        times, valid = _with_format(distinct, format_)
    else:
        times, valid = _without_format(distinct, unit)
    if not len(distinct):
        return np.zeros(len(values), np.int64), np.zeros(len(values), np.bool_)
    codes = encoded.indices.fill_null(0).to_numpy(zero_copy_only=False)
    return times[codes], valid[codes] & np.asarray(values.is_valid())


def _with_format(distinct: Any, format_: str) -> tuple[IntArray, BoolArray]:
    times, valid = np.zeros(len(distinct), np.int64), np.zeros(len(distinct), np.bool_)
    if PLAIN_FORMAT.fullmatch(format_) and all(part in format_ for part in ("%Y", "%m", "%d")):
        read = pc.strptime(distinct, format_, "s", error_is_null=True)
        # Arrow takes 30 February for 2 March: only what is written back the same is taken from it.
        valid = np.asarray(pc.equal(pc.strftime(read, format_), distinct).fill_null(False))
        times[valid] = _from_integers(read.cast(pa.int64()), MICROSECONDS["s"])[0][valid]
    slow = np.flatnonzero(~valid)
    times[slow], valid[slow] = _each(distinct.take(slow), lambda text: datetime.strptime(text, format_))
    return times, valid


def _without_format(distinct: Any, unit: Unit) -> tuple[IntArray, BoolArray]:
    times, valid = np.zeros(len(distinct), np.int64), np.zeros(len(distinct), np.bool_)
    whole = pc.match_substring_regex(distinct, WHOLE_NUMBER).to_numpy(zero_copy_only=False)
    number = pc.match_substring_regex(distinct, NUMBER).to_numpy(zero_copy_only=False) & ~whole
    rest = ~(whole | number)
    for mask, kind in ((whole, pa.int64()), (number, pa.float64())):
        if mask.any():
            numbers = distinct.filter(pa.array(mask)).cast(kind)
            read = _from_integers if kind == pa.int64() else _from_floats
            times[mask], valid[mask] = read(numbers, MICROSECONDS[unit])
    if rest.any():
        times[rest], valid[rest] = _iso(distinct.filter(pa.array(rest)))
    return times, valid


def _iso(distinct: Any) -> tuple[IntArray, BoolArray]:
    for kind in (pa.timestamp("us"), pa.timestamp("us", "UTC")):
        try:
            return _from_integers(distinct.cast(kind).cast(pa.int64()), MICROSECONDS["us"])
        except pa.ArrowInvalid:
            continue
    return _each(distinct, lambda text: datetime.fromisoformat(text.strip()))


def _each(distinct: Any, read: Callable[[str], datetime]) -> tuple[IntArray, BoolArray]:
    times, valid = np.zeros(len(distinct), np.int64), np.zeros(len(distinct), np.bool_)
    microsecond = timedelta(microseconds=1)
    for position, text in enumerate(distinct.to_pylist()):
        try:
            time = read(text)
        except ValueError:
            continue
        zoned = time if time.tzinfo else time.replace(tzinfo=UTC)
        times[position], valid[position] = (zoned - EPOCH) // microsecond, True
    return times, valid
