"""Filters over the columns of the item table, such as {"field": "price", "gt": 10, "lte": 80}.

A filter is one of {"all": [...]}, {"any": [...]}, {"not": {...}} and a condition: a field and one or more of eq, in,
lt, lte, gt, gte, exists, which must all hold. An item without a value meets no condition but {"exists": false}; of a
list of values one that meets all of a condition is enough. Read once into a `Filter`, it becomes a mask (`ItemMasks`).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, overload

import pyarrow as pa
import pyarrow.types as pat

MAX_CONDITIONS = 200
MAX_DEPTH = 16
MAX_VALUES = 1000
OPERATIONS = ("eq", "in", "lt", "lte", "gt", "gte", "exists")
ORDERED = ("lt", "lte", "gt", "gte")

Kind = Literal["text", "number", "boolean", "time"]
Value = str | int | float | bool


class FilterError(Exception):
    """A filter that cannot be read; `path` leads to the part of it that is wrong."""

    def __init__(self, path: Sequence[str | int], detail: str) -> None:
        super().__init__(detail)
        self.path, self.detail = tuple(path), detail


@dataclass(frozen=True, slots=True)
class Condition:
    """One field, and what its value must meet: pairs of an operation and its value (for `in`: a tuple)."""

    field: str
    tests: tuple[tuple[str, Value | tuple[Value, ...]], ...]


@dataclass(frozen=True, slots=True)
class Combination:
    """Filters of which all, any or (of one) not must hold."""

    how: Literal["all", "any", "not"]
    parts: tuple["Filter", ...]


Filter = Condition | Combination


def read_filter(data: Any, kinds: Mapping[str, Kind]) -> Filter:
    """The filter that JSON data says, over the fields of `kinds`; FilterError names the part that is wrong."""
    reader = _Reader(kinds)
    return reader.filter(data, ())


def kind_of(type_: pa.DataType) -> Kind | None:
    """How the values of a column are compared; None when they cannot be."""
    while pat.is_list(type_) or pat.is_large_list(type_) or pat.is_dictionary(type_):
        type_ = type_.value_type
    if pat.is_string(type_) or pat.is_large_string(type_):
        return "text"
    if pat.is_boolean(type_):
        return "boolean"
    if pat.is_integer(type_) or pat.is_floating(type_) or pat.is_decimal(type_):
        return "number"
    return "time" if pat.is_timestamp(type_) or pat.is_date(type_) else None


class _Reader:
    def __init__(self, kinds: Mapping[str, Kind]) -> None:
        self._kinds = kinds
        self._conditions = 0

    def filter(self, data: Any, path: tuple[str | int, ...]) -> Filter:
        if len(path) > 2 * MAX_DEPTH:
            raise FilterError(path, f"a filter is at most {MAX_DEPTH} levels deep")
        if not isinstance(data, dict):
            raise FilterError(
                path, 'a filter is an object: {"field": ...}, {"all": [...]}, {"any": [...]}, {"not": {...}}'
            )
        if "field" in data:
            return self._condition(data, path)
        if len(data) != 1 or (how := next(iter(data))) not in ("all", "any", "not"):
            unknown = [name for name in data if name not in ("all", "any", "not")]
            raise FilterError((*path, *unknown[:1]), "a filter has one of: field, all, any, not")
        if how == "not":
            return Combination("not", (self.filter(data["not"], (*path, "not")),))
        parts = data[how]
        if not isinstance(parts, list) or not parts:
            raise FilterError((*path, how), "a list of one or more filters")
        read = tuple(self.filter(part, (*path, how, place)) for place, part in enumerate(parts))
        return Combination(how, read)

    def _condition(self, data: dict[str, Any], path: tuple[str | int, ...]) -> Condition:
        self._conditions += 1
        if self._conditions > MAX_CONDITIONS:
            raise FilterError(path, f"a filter has at most {MAX_CONDITIONS} conditions")
        field = data["field"]
        if not isinstance(field, str) or field not in self._kinds:
            raise FilterError(
                (*path, "field"), f"no such field of the items; fields: {', '.join(self._kinds) or 'none'}"
            )
        wrong = [name for name in data if name != "field" and name not in OPERATIONS]
        if wrong or len(data) == 1:
            raise FilterError((*path, *wrong[:1]), f"a condition has one or more of: {', '.join(OPERATIONS)}")
        kind = self._kinds[field]
        tests = [(name, _operand(name, value, kind, (*path, name))) for name, value in data.items() if name != "field"]
        return Condition(field, tuple(tests))


def _operand(name: str, value: Any, kind: Kind, path: tuple[str | int, ...]) -> Value | tuple[Value, ...]:
    if name == "exists":
        if type(value) is not bool:
            raise FilterError(path, "true or false")
        return value
    if name in ORDERED and kind == "boolean":
        raise FilterError(path, "true and false have no order")
    if name != "in":
        return _value(value, kind, path)
    if not isinstance(value, list) or len(value) > MAX_VALUES:
        raise FilterError(path, f"a list of at most {MAX_VALUES} values")
    return tuple(_value(one, kind, (*path, place)) for place, one in enumerate(value))


def _value(value: Any, kind: Kind, path: tuple[str | int, ...]) -> Value:
    fits = {"text": (str,), "number": (int, float), "boolean": (bool,), "time": (str, int, float)}[kind]
    if type(value) not in fits:
        wanted = {"text": "text", "number": "a number", "boolean": "true or false"}.get(
            kind, "ISO 8601 text or seconds"
        )
        raise FilterError(path, f"the field holds {kind}: {wanted} is wanted")
    if kind != "time":
        return value  # type: ignore[no-any-return]
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else datetime.fromtimestamp(value, UTC)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        return round(moment.timestamp() * 1e6)
    except (ValueError, OverflowError, OSError) as error:
        raise FilterError(path, "ISO 8601 text, or seconds since 1970") from error


class ArrowSequence(Sequence[Any]):
    """An Arrow array as a sequence of Python values, for bisect."""

    def __init__(self, values: pa.Array) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, place: int) -> Any: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[Any]: ...
    def __getitem__(self, place: int | slice) -> Any:
        assert isinstance(place, int)
        return self._values[place].as_py()


def code_range(name: str, value: Any, values_U: Sequence[Any]) -> tuple[int, int]:
    """The places [start, stop) of the ordered distinct values that meet eq, lt, lte, gt or gte."""
    U = len(values_U)
    if name == "eq":
        return bisect_left(values_U, value), bisect_right(values_U, value)
    if name in ("lt", "lte"):
        return 0, (bisect_left if name == "lt" else bisect_right)(values_U, value)
    return (bisect_right if name == "gt" else bisect_left)(values_U, value), U
