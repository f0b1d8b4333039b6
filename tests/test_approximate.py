"""Indexes of faiss: what they find is scored exactly, and filters hold."""

import fcntl
import logging
import os
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from conftest import save_tiny, tiny_config

from seqray.bundle import Bundle
from seqray.catalogue import Catalogue
from seqray.errors import BundleError
from seqray.index_file import KEPT
from seqray.models.protocol import build_model
from seqray.recommender import Query, Recommender
from seqray.serve_config import RetrievalConfig

NUM_ITEMS = 4_000
KINDS = ("hnsw", "ivfpq")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    rows = range(1, NUM_ITEMS + 1)
    items = pa.table(
        {
            "item_id": [f"i{row}" for row in rows],
            "train_events": pa.array([NUM_ITEMS // row for row in rows], pa.int64()),
            "half": [row % 2 == 0 for row in rows],
            "number": list(rows),
        }
    )
    config = tiny_config()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        state = build_model(config.model, Catalogue(NUM_ITEMS, items)).state_dict()
    state = {name: tensor * 20 if name.startswith("items.") else tensor for name, tensor in state.items()}
    return save_tiny(tmp_path_factory.mktemp("many") / "bundle", items=items, state=state)


@pytest.fixture(scope="module")
def exact(bundle: Bundle) -> Recommender:
    return Recommender(bundle)


@pytest.fixture(scope="module", params=KINDS)
def approximate(
    bundle: Bundle, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Recommender:
    retrieval = RetrievalConfig(type=request.param, probes=200, min_recall=0.8)
    return Recommender(bundle, retrieval=retrieval, index_folder=tmp_path_factory.mktemp(request.param))


QUERIES = [Query(tuple(f"i{1 + (17 * number + place) % NUM_ITEMS}" for place in range(5)), 20) for number in range(40)]


def test_most_of_the_best_are_found_with_the_exact_scores(approximate: Recommender, exact: Recommender) -> None:
    hits = 0
    for found, wanted in zip(approximate.recommend(QUERIES), exact.recommend(QUERIES), strict=True):
        scores = {item.item_id: item.score for item in wanted.items}
        assert len(found.items) == 20
        assert [item.score for item in found.items] == sorted((item.score for item in found.items), reverse=True)
        for item in found.items:
            if item.item_id in scores:
                hits += 1
                assert item.score == pytest.approx(scores[item.item_id], rel=1e-4)
    assert hits > 0.9 * 20 * len(QUERIES)


@pytest.mark.parametrize(
    "data", [{"field": "half", "eq": True}, {"field": "number", "lt": 3_000}, {"field": "number", "lt": 7}]
)
def test_filters_and_exclusions_hold(approximate: Recommender, exact: Recommender, data: dict) -> None:
    chosen = approximate.read_filter(data)
    excluded = tuple(item.item_id for item in exact.recommend([Query(("i9",), 3, filter=chosen)])[0].items)
    query = Query(("i9", "i5"), 20, exclude_items=excluded, filter=chosen)
    [found], [wanted] = approximate.recommend([query]), exact.recommend([query])
    assert len(found.items) == len(wanted.items)
    numbers = [int(item.item_id[1:]) for item in found.items]
    assert all(number % 2 == 0 if "eq" in data else number < data["lt"] for number in numbers)
    assert not {item.item_id for item in found.items} & {*excluded, "i9", "i5"}
    ids = [item.item_id for item in wanted.items]
    assert sum(item.item_id in ids for item in found.items) >= 0.8 * len(ids)


def test_where_an_index_finds_too_few_all_items_are_searched(
    bundle: Bundle, exact: Recommender, tmp_path: Path
) -> None:
    retrieval = RetrievalConfig(type="ivfpq", probes=1, lists=80, candidates=1, min_recall=0)
    few = Recommender(bundle, retrieval=retrieval, index_folder=tmp_path)
    query = Query(("i9", "i5"), 500)
    [found], [wanted] = few.recommend([query]), exact.recommend([query])
    assert [item.item_id for item in found.items] == [item.item_id for item in wanted.items]


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_is_built_once_and_its_recall_told(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    retrieval = RetrievalConfig(type=kind, probes=200, effort=60, min_recall=0.5)
    with caplog.at_level(logging.WARNING):
        first = Recommender(bundle, retrieval=retrieval, index_folder=tmp_path).recommend(QUERIES)
    assert f"{kind} index of 4,000 items built" in caplog.text
    assert "of the exact 20 best" in caplog.text
    caplog.clear()
    again = Recommender(bundle, retrieval=retrieval, index_folder=tmp_path).recommend(QUERIES)
    assert not caplog.records
    assert first == again
    assert [path.suffix for path in tmp_path.iterdir() if not path.name.startswith(".")] == [".faiss"]


def test_the_last_indexes_that_were_used_stay(bundle: Bundle, tmp_path: Path) -> None:
    def use(neighbours: int) -> Path:
        retrieval = RetrievalConfig(type="hnsw", neighbours=neighbours, effort=20, min_recall=0)
        before = set(tmp_path.glob("*.faiss"))
        Recommender(bundle, retrieval=retrieval, index_folder=tmp_path)
        return next(iter(set(tmp_path.glob("*.faiss")) - before), tmp_path)

    paths = [use(neighbours) for neighbours in range(2, 2 + KEPT)]
    for age, path in enumerate(reversed(paths)):
        os.utime(path, (1e9 - age, 1e9 - age))
    half, under_way = tmp_path / ".1234.faiss.99", tmp_path / ".5678.faiss.99"
    for path in (half, under_way):
        path.touch()
    assert use(2) == tmp_path  # the oldest is there, and is the newest now
    with (tmp_path / ".5678.lock").open("w") as building, (tmp_path / f".{paths[2].stem}.lock").open("w") as reading:
        for lock in (building, reading):
            fcntl.flock(lock, fcntl.LOCK_EX)
        added = [use(100)]
        assert set(tmp_path.glob("*.faiss")) == {paths[0], *paths[2:], *added}
        added.append(use(101))  # what should go now is being read
        assert set(tmp_path.glob("*.faiss")) == {paths[0], *paths[2:], *added}
    assert not half.exists()
    assert under_way.exists()
    added.append(use(102))
    assert set(tmp_path.glob("*.faiss")) == {paths[0], *paths[4:], *added}


def test_an_index_that_finds_too_little_is_refused_and_not_kept(bundle: Bundle, tmp_path: Path) -> None:
    retrieval = RetrievalConfig(type="ivfpq", probes=1, lists=80, candidates=30, min_recall=0.99)
    with pytest.raises(BundleError, match=r"less than min_recall 0\.99; raise effort"):
        Recommender(bundle, retrieval=retrieval, index_folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".faiss"]
