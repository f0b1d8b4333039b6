"""Ids, times, order, minimums and splits on small logs whose answers can be seen."""

import uuid
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from seqray.data_config import SplitConfig
from seqray.errors import DataError
from seqray.id_columns import encode_ids, id_column
from seqray.interactions import Interactions, shuffled_ties
from seqray.splits import SplitPositions, split_positions
from seqray.timestamps import time_column

SECOND = 1_000_000
DAY = 86_400 * SECOND


def interactions(
    users: list[int], items: list[int], times: list[int], baskets: list[int] | None = None
) -> Interactions:
    return Interactions(
        user_ids=pa.array(range(max(users) + 1)),
        item_ids=pa.array(range(max(items) + 1)),
        users_E=np.array(users),
        items_E=np.array(items),
        timestamps_E=np.array(times),
        baskets_E=None if baskets is None else np.array(baskets),
    )


def ids(values: pa.Array) -> list[Any]:
    found: list[Any] = id_column(pa.chunked_array([values]), "log").to_pylist()
    return found


def test_ids_become_integers_or_text() -> None:
    key = uuid.UUID("12345678-1234-5678-1234-567812345678")
    assert ids(pa.array([3, None, 1], pa.int16())) == [3, None, 1]
    assert ids(pa.array([3.0, float("nan"), None])) == [3, None, None]
    assert ids(pa.array(["b", "", None]).dictionary_encode()) == ["b", None, None]
    assert ids(pa.array([Decimal("1.50")])) == ["1.50"]
    assert ids(pa.array([2**64 - 1], pa.uint64())) == [str(2**64 - 1)]
    assert ids(pa.array([key.bytes, None], pa.uuid())) == [str(key), None]


@pytest.mark.parametrize("values", [[True], [[1]], [{"a": 1}], [1.5], [2.0**60]])
def test_other_types_are_no_ids(values: list[Any]) -> None:
    with pytest.raises(DataError, match="log"):
        ids(pa.array(values))


def test_text_ids_become_integers_only_when_all_are_canonical() -> None:
    for texts, guess, distinct in [
        (["10", "9", "10"], True, [9, 10]),
        (["10", "9", "-3"], True, [-3, 9, 10]),
        (["10", "9", "007"], True, ["007", "10", "9"]),
        (["10", "9", "9999999999999999999"], True, ["10", "9", "9999999999999999999"]),
        (["10", "9"], False, ["10", "9"]),
    ]:
        found, codes = encode_ids([pa.array(texts, pa.large_string())], guess)
        assert found.to_pylist() == distinct
        assert [str(found[code]) for code in codes] == texts


def test_ids_of_files_with_different_types_become_text() -> None:
    found, codes = encode_ids([pa.array([10, 9]), pa.array(["9"], pa.large_string())])
    assert (found.to_pylist(), codes.tolist()) == (["10", "9"], [0, 1, 1])


def times(values: pa.Array, unit: str = "s", format_: str | None = None) -> list[int | None]:
    found, valid = time_column(pa.chunked_array([values]), unit, format_, "log")  # type: ignore[arg-type]
    return [int(time) if good else None for time, good in zip(found, valid, strict=True)]


def test_times_of_every_kind_are_microseconds() -> None:
    noon = datetime(1970, 1, 1, 12)
    half_day = 43_200 * SECOND
    assert times(pa.array([noon, None], pa.timestamp("ns"))) == [half_day, None]
    assert times(pa.array([noon], pa.timestamp("s", "Europe/Paris"))) == [half_day]
    assert times(pa.array([date(1970, 1, 2)])) == [DAY]
    assert times(pa.array([7, -1], pa.int32()), "ms") == [7000, -1000]
    assert times(pa.array([7999, None]), "ns") == [7, None]
    assert times(pa.array([1_700_000_000.123456, float("inf"), float("nan"), 1e30])) == [
        1_700_000_000_123_456,
        None,
        None,
        None,
    ]
    assert times(pa.array([2**62])) == [None]
    assert times(pa.array([3], pa.uint64())) == [3 * SECOND]
    assert times(pa.nulls(1)) == [None]


def test_times_as_text() -> None:
    assert times(pa.array(["1970-01-01 00:00:01", "1970-01-02", None])) == [SECOND, DAY, None]
    assert times(pa.array(["1970-01-01T01:00:01+01:00", "1970-01-01T00:00:01Z"])) == [SECOND, SECOND]
    assert times(pa.array(["1970-01-01T00:00:01Z", "1970-01-02", "soon", ""])) == [SECOND, DAY, None, None]
    assert times(pa.array(["12", "1.5", "nan", "1970-01-02"])) == [12 * SECOND, 1_500_000, None, DAY]
    assert times(pa.array([], pa.string())) == []


@pytest.mark.parametrize(
    ("format_", "texts", "expected"),
    [
        ("%d/%m/%Y", ["02/01/1970", "2/1/1970", "30/02/1970", "02/01/1970 ", None], [DAY, DAY, None, None, None]),
        ("%Y%m%d %H:%M:%S", ["19700102 00:00:01", "19700102 00:00:61"], [DAY + SECOND, None]),
        ("%Y-%m-%dT%H:%M:%S.%f%z", ["1970-01-02T01:00:00.5+0100"], [DAY + SECOND // 2]),
        ("%H:%M", ["00:00"], [-2_208_988_800 * SECOND]),
    ],
)
def test_times_in_a_stated_format(format_: str, texts: list[str | None], expected: list[int | None]) -> None:
    assert times(pa.array(texts), "s", format_) == expected


@pytest.mark.parametrize("values", [[True], [[1]], [b"x"]])
def test_other_types_are_no_times(values: list[Any]) -> None:
    with pytest.raises(DataError, match="log"):
        times(pa.array(values))


def test_order_is_by_user_then_time_then_file_or_tie() -> None:
    log = interactions([1, 0, 1, 1, 0], [0, 1, 2, 3, 4], [5, 9, 5, 1, 9])
    assert log.ordered().items_E.tolist() == [1, 4, 3, 0, 2]
    assert log.ordered(np.array([2, 1, 1, 0, 0])).items_E.tolist() == [4, 1, 3, 2, 0]


def test_shuffled_ties_depend_on_the_seed_alone() -> None:
    log = interactions([0] * 50, list(range(50)), [0] * 50)
    orders = [log.ordered(shuffled_ties(50, seed)).items_E.tolist() for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(50))


def test_a_basket_stays_together_at_its_start() -> None:
    # Basket 0 begins at 1 and goes on at 5; the event without a basket is at 3; basket 1 at 3 came first in the file.
    log = interactions([0] * 5, [0, 1, 2, 3, 4], [5, 3, 1, 3, 3], [0, 1, 0, -1, 1])
    ordered = log.ordered()
    assert ordered.items_E.tolist() == [0, 2, 1, 4, 3]
    assert ordered.timestamps_E.tolist() == [1, 1, 3, 3, 3]
    assert ordered.basket_ends().tolist() == [2, 2, 4, 4, 5]
    assert log.ordered(np.array([4, 3, 2, 1, 0])).items_E.tolist() == [2, 0, 4, 1, 3]


def test_the_same_basket_number_of_two_users_is_two_baskets() -> None:
    ordered = interactions([0, 1], [0, 1], [9, 1], [7, 7]).ordered()
    assert ordered.timestamps_E.tolist() == [9, 1]
    assert ordered.basket_ends().tolist() == [1, 2]


def test_without_repeats_keeps_the_first_in_time() -> None:
    log = interactions([0, 0, 0, 1], [1, 0, 1, 1], [3, 2, 1, 4]).ordered().without_repeats()
    assert (log.users_E.tolist(), log.items_E.tolist()) == ([0, 0, 1], [1, 0, 1])
    assert log.timestamps_E.tolist() == [1, 2, 4]


def test_k_core_repeats_until_stable_and_one_pass_does_not() -> None:
    # Item 2 has one event; without it user 1 has one; without that event item 1 has one; and so on.
    log = interactions([0, 0, 0, 1, 1], [0, 0, 1, 1, 2], [0, 1, 2, 3, 4])
    core = log.filtered(2, 2, "k_core").compacted()
    assert (core.items_E.tolist(), core.user_ids.to_pylist(), core.item_ids.to_pylist()) == ([0, 0], [0], [0])
    assert log.filtered(2, 2, "one_pass").items_E.tolist() == [0, 0, 1]
    assert len(log.filtered(9, 9, "k_core")) == 0


def test_compacted_keeps_ids_ascending_without_gaps() -> None:
    log = interactions([2, 0], [5, 3], [0, 1]).compacted()
    assert (log.user_ids.to_pylist(), log.users_E.tolist()) == ([0, 2], [1, 0])
    assert (log.item_ids.to_pylist(), log.items_E.tolist()) == ([3, 5], [1, 0])
    assert log.offsets().tolist() == [0, 1, 2]


def lists(split: SplitPositions) -> list[list[int]]:
    return [
        column.tolist()
        for column in (split.train_end, split.val_start, split.val_end, split.test_start, split.test_end)
    ]


def test_leave_one_out_needs_three_events() -> None:
    split = split_positions(interactions([0] * 2 + [1] * 4, [0] * 6, list(range(6))), SplitConfig())
    assert lists(split) == [[2, 2], [2, 2], [2, 3], [2, 3], [2, 4]]


def at(day: int) -> datetime:
    return datetime(1970, 1, 1 + day)


def temporal(target: str = "next_item") -> SplitConfig:
    return SplitConfig.model_validate(
        {"type": "temporal", "validation_cut": at(2), "test_cut": at(4), "target": target}
    )


def test_temporal_targets_need_a_history_before_the_cut() -> None:
    days = [0, 1, 2, 2, 3, 4, 5, 3, 4, 5, 0, 1]
    users = [0] * 7 + [1] * 2 + [2] + [3] * 2
    log = interactions(users, [0] * 12, [day * DAY for day in days])
    assert lists(split_positions(log, temporal())) == [
        [2, 0, 0, 2],
        [2, 0, 0, 2],
        [3, 0, 0, 2],
        [5, 1, 0, 2],
        [6, 2, 0, 2],
    ]
    # Without baskets the events of one time are a basket.
    assert split_positions(log, temporal("next_basket")).val_end.tolist() == [4, 0, 0, 2]


def test_next_basket_is_the_whole_first_basket() -> None:
    log = interactions([0] * 5, [0] * 5, [0, 2 * DAY, 2 * DAY, 4 * DAY, 4 * DAY + 1], [0, 1, 2, 3, 3]).ordered()
    split = split_positions(log, temporal("next_basket"))
    assert lists(split) == [[1], [1], [2], [3], [5]]


def test_test_fraction_cuts_where_the_newest_share_begins() -> None:
    log = interactions([0] * 10, [0] * 10, [second * SECOND for second in range(10)])
    config = SplitConfig.model_validate({"type": "temporal", "test_fraction": 0.2})
    assert lists(split_positions(log, config)) == [[6], [6], [7], [8], [9]]


@pytest.mark.parametrize("cut", [{"test_cut": at(20)}, {"validation_cut": datetime(1969, 1, 1)}])
def test_a_cut_outside_the_log_names_its_range(cut: dict[str, datetime]) -> None:
    log = interactions([0, 0], [0, 0], [0, 9 * DAY])
    config = SplitConfig.model_validate({"type": "temporal", "validation_cut": at(2), "test_cut": at(4), **cut})
    with pytest.raises(DataError, match=r"1970-01-01T00:00:00Z to 1970-01-10T00:00:00Z"):
        split_positions(log, config)


def test_a_fraction_that_leaves_a_part_empty_is_refused() -> None:
    log = interactions([0, 0, 0], [0, 0, 0], [0, 5, 5])
    with pytest.raises(DataError, match="empty"):
        split_positions(log, SplitConfig.model_validate({"type": "temporal", "test_fraction": 0.3}))
