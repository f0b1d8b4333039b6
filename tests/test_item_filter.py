"""Filters: read from JSON with every mistake named, and the masks they become."""

import re
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
import torch

from seqray.item_filter import MAX_CONDITIONS, FilterError, read_filter
from seqray.item_masks import ItemMasks

ITEMS = pa.table(
    {
        "item_id": [11, 12, 13, 14, 15],
        "train_events": [5, 4, 3, 2, 1],
        "category": pa.array(["shoes", "hats", None, "shoes", "bags"]).dictionary_encode(),
        "price": [10.0, 20.0, 30.0, float("nan"), None],
        "cost": [Decimal("1.50"), Decimal("2.00"), None, Decimal("0.10"), Decimal("9.99")],
        "stock": pa.array([2**53, 2**53 + 1, 0, -1, None], pa.int64()),
        "new": [True, False, None, True, False],
        "since": pa.array([date(2026, 1, n) for n in range(1, 6)], pa.date32()),
        "seen": pa.array([datetime(2026, 1, 1, n, tzinfo=UTC) for n in range(5)], pa.timestamp("ns", "Europe/Paris")),
        "tags": pa.array([["red", "wool"], ["blue"], [], None, ["red", None]]),
        "sizes": pa.array([[38, 45], [40], [], None, [44]]),
        "blob": [b"1"] * 5,
    }
)


@pytest.fixture(scope="module")
def masks() -> ItemMasks:
    return ItemMasks(ITEMS, torch.device("cpu"))


def found(masks: ItemMasks, data: Any) -> list[int]:
    """The item ids that a filter lets through."""
    allowed_V = masks.mask(read_filter(data, masks.kinds))
    assert not allowed_V[0]
    return [10 + item for item in torch.nonzero(allowed_V).flatten().tolist()]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"field": "category", "eq": "shoes"}, [11, 14]),
        ({"field": "category", "in": ["hats", "bags", "nothing"]}, [12, 15]),
        ({"field": "category", "in": []}, []),
        ({"field": "category", "gt": "bags", "lte": "hats"}, [12]),
        ({"field": "category", "exists": True}, [11, 12, 14, 15]),
        ({"field": "category", "exists": False}, [13]),
        ({"field": "category", "exists": False, "eq": "shoes"}, []),
        ({"not": {"field": "category", "eq": "shoes"}}, [12, 13, 15]),
        ({"field": "price", "gte": 10, "lt": 30}, [11, 12]),
        ({"field": "price", "gt": 10}, [12, 13]),
        ({"field": "price", "exists": False}, [14, 15]),
        ({"field": "cost", "lte": 1.5}, [11, 14]),
        ({"field": "cost", "eq": 2}, [12]),
        ({"field": "stock", "eq": 2**53 + 1}, [12]),
        ({"field": "stock", "lt": 0.5}, [13, 14]),
        ({"field": "new", "eq": True}, [11, 14]),
        ({"field": "new", "in": [True, False]}, [11, 12, 14, 15]),
        ({"field": "since", "gte": "2026-01-04"}, [14, 15]),
        ({"field": "seen", "lt": "2026-01-01T02:00:00Z"}, [11, 12]),
        ({"field": "seen", "lte": "2026-01-01T02:00:00+01:00"}, [11, 12]),
        ({"field": "seen", "eq": 1767225600}, [11]),
        ({"field": "tags", "eq": "red"}, [11, 15]),
        ({"field": "tags", "exists": False}, [13, 14]),
        ({"field": "sizes", "gt": 38, "lt": 45}, [12, 15]),
        ({"field": "item_id", "in": ["12", "99"]}, [12]),
        ({"all": [{"field": "tags", "eq": "red"}, {"field": "price", "lte": 80}]}, [11]),
        ({"any": [{"field": "category", "eq": "bags"}, {"not": {"field": "price", "exists": True}}]}, [14, 15]),
    ],
)
def test_what_a_filter_lets_through(masks: ItemMasks, data: Any, expected: list[int]) -> None:
    assert found(masks, data) == expected


@pytest.mark.parametrize(
    ("data", "path", "detail"),
    [
        ([], (), "a filter is an object"),
        ({}, (), "one of: field, all, any, not"),
        ({"all": [], "any": []}, (), "one of"),
        ({"and": []}, ("and",), "one of: field, all, any, not"),
        ({"all": []}, ("all",), "one or more filters"),
        ({"all": [{"field": "colour", "eq": "red"}]}, ("all", 0, "field"), "no such field.*category, price"),
        ({"field": "train_events", "eq": 1}, ("field",), "no such field"),
        ({"field": "blob", "exists": True}, ("field",), "no such field"),
        ({"field": ["x"], "eq": 1}, ("field",), "no such field"),
        ({"field": "price"}, (), "one or more of: eq, in"),
        ({"not": {"field": "price", "above": 3}}, ("not", "above"), "one or more of: eq, in"),
        ({"field": "price", "eq": "3"}, ("eq",), "a number is wanted"),
        ({"field": "price", "eq": True}, ("eq",), "a number is wanted"),
        ({"field": "category", "in": ["a", 3]}, ("in", 1), "text is wanted"),
        ({"field": "category", "in": "a"}, ("in",), "a list"),
        ({"field": "category", "exists": 1}, ("exists",), "true or false"),
        ({"field": "new", "lt": True}, ("lt",), "no order"),
        ({"field": "since", "lt": "soon"}, ("lt",), "ISO 8601"),
        ({"field": "since", "lt": 1e300}, ("lt",), "ISO 8601"),
        ({"any": [{"field": "new", "eq": True}] * (MAX_CONDITIONS + 1)}, ("any", MAX_CONDITIONS), "at most 200"),
    ],
)
def test_a_mistake_in_a_filter_is_named(masks: ItemMasks, data: Any, path: tuple, detail: str) -> None:
    with pytest.raises(FilterError) as error:
        read_filter(data, masks.kinds)
    assert error.value.path == path
    assert re.search(detail, error.value.detail)


def test_a_filter_has_a_greatest_depth(masks: ItemMasks) -> None:
    data: Any = {"field": "new", "eq": True}
    for _ in range(10_000):
        data = {"not": data}
    with pytest.raises(FilterError, match="levels deep"):
        read_filter(data, masks.kinds)


def test_equal_filters_share_a_mask_and_old_ones_go(masks: ItemMasks, monkeypatch) -> None:
    monkeypatch.setattr("seqray.item_masks.CACHED_BYTES", 2 * 6)
    fresh = ItemMasks(ITEMS, torch.device("cpu"))
    filters = [read_filter({"field": "price", "lt": limit}, fresh.kinds) for limit in (15, 25, 35)]
    first = fresh.mask(filters[0])
    assert fresh.mask(read_filter({"field": "price", "lt": 15}, fresh.kinds)) is first
    for one in filters[1:]:
        fresh.mask(one)
    again = fresh.mask(filters[0])
    assert again is not first
    assert torch.equal(again, first)


def test_one_and_one_point_nought_and_true_are_not_mixed_up(masks: ItemMasks) -> None:
    assert found(masks, {"field": "new", "eq": True}) == [11, 14]
    assert found(masks, {"field": "price", "in": [10, 20.0]}) == [11, 12]
