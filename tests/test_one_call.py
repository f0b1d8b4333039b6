"""The kernel that answers a query from its ids on, against the longer way; skipped where it cannot run."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import FEATURES, NUM_ITEMS, save_tiny, tiny_config, tiny_state
from kernels import needs_kernels

from seqray.bundle import Bundle
from seqray.one_call import OneCall
from seqray.recommender import Query, Recommender

pytestmark = needs_kernels
TWINS = "3112799", "1968915"
"""Ids of one slot in a small table, with the same half of their hashes."""
IDS = [*TWINS, "", "ÄÖ€", "a b", "17", *(f"i{number}" for number in range(NUM_ITEMS - 6))]
STRANGE: list[Any] = [17, int(TWINS[0]), "\ud800", "i", "i999", None, 2.5, "n\0l"]


def save(folder: Path, ids: Sequence[Any] = IDS) -> Bundle:
    events, prices = [*range(len(ids))], [float(number) for number in range(len(ids))]
    items = pa.table({"item_id": ids, "train_events": events, "price": prices})
    return save_tiny(folder / "bundle", items=items, state=tiny_state(tiny_config(), len(ids)))


def both(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> tuple[Recommender, Recommender]:
    """One that has the kernel, and one that has none."""
    with monkeypatch.context() as without:
        without.setenv("SEQRAY_NATIVE", "off")
        longer = Recommender(bundle)
    quick = Recommender(bundle, build_kernels=True)
    assert quick._one_call is not None
    assert longer._one_call is None
    return quick, longer


def check(quick: Recommender, longer: Recommender, queries: list[Query]) -> None:
    for query, mine, its in zip(queries, quick.recommend(queries), longer.recommend(queries), strict=True):
        assert [(item.item_id, item.source) for item in mine.items] == [(i.item_id, i.source) for i in its.items], query
        assert [item.score for item in mine.items] == pytest.approx(
            [item.score for item in its.items], rel=1e-4, abs=1e-4
        )
        assert (mine.unknown_items, mine.fallback_used) == (its.unknown_items, its.fallback_used), query


@pytest.mark.parametrize("with_nul", [False, True])
def test_the_answers_are_those_of_the_longer_way(
    with_nul: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick, longer = both(save(tmp_path), monkeypatch)
    chance = random.Random(0)
    known: list[Any] = [*IDS, *STRANGE[: len(STRANGE) - 1 + with_nul]]
    cheap = quick.read_filter({"field": "price", "lt": 9})

    def query() -> Query:
        return Query(
            tuple(chance.choices(known, k=chance.choice([0, 1, 2, 5, 8, 20]))), chance.choice([1, 5, 100]),
            exclude_items=tuple(chance.choices(known, k=chance.choice([0, 3]))),
            exclude_seen=chance.choice([None, True, False]), fallback=chance.choice(["popular", "none"]),
            filter=chance.choice([None, cheap]), candidates=chance.choice([None, None, None, ("i1", "i2")]),
            explain=chance.random() < 0.1,
        )  # fmt: skip

    for size in (1, 2, 7, 40):
        check(quick, longer, [query() for _ in range(size)])


def test_ids_in_one_slot_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, longer = both(save(tmp_path / "two", [*TWINS, "a", "b"]), monkeypatch)
    check(quick, longer, [Query((one, "a"), exclude_seen=False) for one in TWINS])
    [first, second] = quick.recommend([Query((one,), exclude_seen=False) for one in TWINS])
    assert first.items != second.items
    quick, longer = both(save(tmp_path / "one", [TWINS[0], "a", "b", "c"]), monkeypatch)
    [answer] = quick.recommend([Query((TWINS[1], "a"))])
    assert answer.unknown_items == (TWINS[1],)
    check(quick, longer, [Query((TWINS[1], "a"))])


@pytest.mark.parametrize(
    "ids", [IDS, range(100, 100 + NUM_ITEMS), ['"', "\\", "\n", "\x01", "ü", *map(str, range(25))]]
)
def test_items_as_json_are_the_items(ids: Sequence[Any], tmp_path: Path) -> None:
    recommender = Recommender(save(tmp_path, ids), build_kernels=True)
    chance = random.Random(0)
    queries = [Query(tuple(chance.choices(ids, k=3)), k) for k in (1, 5, 7, 100)] + [Query((ids[0], "never"), 2)]
    nobody = Query(("never",), 3)
    plain = recommender.recommend([*queries, nobody])
    mixed = recommender.recommend([*(replace(query, as_json=True) for query in queries), nobody, *queries])
    assert mixed[len(queries) + 1 :] == plain[:-1]
    for items, as_json in zip(plain[:-1], mixed[: len(queries)], strict=True):
        assert as_json.items == ()
        assert as_json.unknown_items == items.unknown_items
        assert as_json.items_json is not None
        assert json.loads(as_json.items_json) == [
            {"item_id": item.item_id, "rank": rank, "score": item.score, "source": item.source}
            for rank, item in enumerate(items.items, start=1)
        ]
    [answer] = recommender.recommend([replace(nobody, as_json=True)])
    assert (answer.items_json, answer.items, answer.fallback_used) == (None, plain[-1].items, True)


def test_no_item_left_as_json(tmp_path: Path) -> None:
    recommender = Recommender(save(tmp_path), build_kernels=True)
    query = Query(("i1",), exclude_items=tuple(IDS), as_json=True)
    assert recommender.recommend([query])[0].items_json == b"[]"


def test_numbers_as_ids(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick, longer = both(save(tmp_path, range(100, 100 + NUM_ITEMS)), monkeypatch)
    check(quick, longer, [Query((101, "102", 7, "x", 103.5)), Query((7,)), Query(("129", 101))])


def test_every_id_of_a_large_catalogue_is_found(tmp_path: Path) -> None:
    ids = [f"{number * 7919}-{number % 13}" for number in range(20_000)]
    recommender = Recommender(save(tmp_path, ids), build_kernels=True)
    histories = [Query(tuple(ids[start : start + 100]), 1) for start in range(0, len(ids), 100)]
    assert not any(answer.unknown_items for answer in recommender.recommend(histories))
    missing = Query(tuple(f"{item_id}0" for item_id in ids), 1)
    assert len(recommender.recommend([missing])[0].unknown_items) == len(ids)


def test_a_model_that_reads_more_than_items_goes_the_longer_way(tmp_path: Path) -> None:
    config = tiny_config().override(FEATURES)
    recommender = Recommender(save_tiny(tmp_path / "b", config=config, state=tiny_state(config)), build_kernels=True)
    assert recommender._one_call is None
    assert recommender.recommend([Query(("i1",))])[0].items


def test_what_it_takes() -> None:
    assert OneCall.takes(Query(("a",)))
    for other in (Query(()), Query(("a",), candidates=("b",)), Query(("a",), explain=True)):
        assert not OneCall.takes(other)
