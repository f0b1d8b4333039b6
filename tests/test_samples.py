"""What a model is trained on, against a slow reference: rows, prefixes, baskets; the same for any number of workers."""

from collections import Counter
from collections.abc import Iterator
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqray.config import Config
from seqray.samples import Step, TrainingSamples
from seqray.sequences import SequenceStore
from train.prepare import ensure_store

LENGTH = 4
Example = tuple[tuple[int, ...], tuple[int, ...]]
"""What is read up to an asked event, and its targets."""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> SequenceStore:
    """40 users of 1 to 25 events in baskets of 1 to 6, the largest of them longer than LENGTH."""
    folder = tmp_path_factory.mktemp("samples")
    random = np.random.default_rng(0)
    rows: list[tuple[int, int, int]] = []
    for user in range(40):
        times = np.sort(random.integers(0, 8, random.integers(1, 26)))
        rows += [(user, int(random.integers(30)), int(time)) for time in times]
    users, items, times = zip(*rows, strict=True)
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), folder / "log.parquet")
    data = {"path": str(folder / "log.parquet")}
    return ensure_store(Config.parse({"name": "samples", "output": str(folder / "out"), "data": data}))


def training(store: SequenceStore) -> Iterator[tuple[list[int], list[int]]]:
    """(items, times) of each user's training events."""
    for begin, length in zip(store.offsets[:-1], store.train_end, strict=True):
        part = slice(begin, begin + length)
        yield store.items[part].tolist(), store.timestamps[part].tolist()


def answers(times: list[int], target: str) -> dict[int, range]:
    """Asked event -> its targets, as positions in the history."""
    if target == "next_item":
        return {place: range(place + 1, place + 2) for place in range(len(times) - 1)}
    baskets = [[place for place, _ in group] for _, group in groupby(enumerate(times), key=lambda pair: pair[1])]
    return {basket[-1]: range(after[0], after[-1] + 1) for basket, after in pairwise(baskets)}


def expected(store: SequenceStore, target: str, prefixes: bool, windows: str) -> Counter[Example]:
    """Every example of an epoch, written down with loops over lists."""
    found: Counter[Example] = Counter()
    for items, times in training(store):
        asked = answers(times, target)
        if prefixes:
            kept = list(asked) if windows == "all" else list(asked)[-LENGTH:]
            runs = [(max(0, place + 1 - LENGTH), [place]) for place in kept]
        else:
            stops = range(max(asked, default=-1) + 1, 0, -LENGTH)
            cuts = [(max(0, stop - LENGTH), stop) for stop in (stops if windows == "all" else stops[:1])]
            runs = [(start, [place for place in asked if start <= place < stop]) for start, stop in cuts]
        for start, places in runs:
            for place in places:
                found[tuple(items[start : place + 1]), tuple(items[answer] for answer in asked[place])] += 1
    return found


def examples(step: Step) -> Iterator[Example]:
    """The examples in a worker's part of a step."""
    items = step.batch.items_T.tolist()
    starts = np.repeat((step.batch.lengths_B.cumsum(0) - step.batch.lengths_B).numpy(), step.batch.lengths_B.numpy())
    asked = range(len(items)) if step.batch.asked_P is None else step.batch.asked_P.tolist()
    targets = step.targets.items_S.tolist()
    rows = range(len(targets)) if step.targets.rows_S is None else step.targets.rows_S.tolist()
    for number, place in enumerate(asked):
        answer = tuple(target for target, row in zip(targets, rows, strict=True) if row == number)
        yield tuple(items[starts[place] : place + 1]), answer


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("windows", ["last", "all"])
@pytest.mark.parametrize("prefixes", [False, True], ids=["rows", "prefixes"])
@pytest.mark.parametrize("target", ["next_item", "next_basket"])
def test_an_epoch_holds_every_example_once(
    store: SequenceStore, target: Any, prefixes: bool, windows: Any, world: int
) -> None:
    samples = TrainingSamples(store, LENGTH, 3, windows=windows, prefixes=prefixes, target=target)
    order = samples.order(epoch=5)
    found: Counter[Example] = Counter()
    targets = tokens = 0
    for number in range(samples.steps(7)):
        parts = [samples.step(order, number, 7, rank, world) for rank in range(world)]
        real = [part for part in parts if part.weight]
        places = [place for part in real for place in part.targets.places_S.tolist()]
        assert sorted(places) == list(range(parts[0].global_targets))
        assert sum(len(part.batch.items_T) for part in real) == parts[0].global_tokens
        for part in real:
            found.update(examples(part))
            targets, tokens = targets + len(part.targets.items_S), tokens + len(part.batch.items_T)
    assert found == expected(store, target, prefixes, windows)
    assert (targets, tokens) == (samples.targets, samples.tokens)
    assert max(len(answer) for _, answer in found) > 1 or target == "next_item"


def test_a_place_belongs_to_its_target_whatever_the_workers(store: SequenceStore) -> None:
    samples = TrainingSamples(store, LENGTH, 0, target="next_basket", windows="all")
    order = samples.order(0)
    [alone] = [samples.step(order, 0, 10, 0, 1)]
    shared: dict[int, int] = {}
    for part in (samples.step(order, 0, 10, rank, 3) for rank in range(3)):
        shared.update(zip(part.targets.places_S.tolist(), part.targets.items_S.tolist(), strict=True))
    assert shared == dict(zip(alone.targets.places_S.tolist(), alone.targets.items_S.tolist(), strict=True))


def test_the_order_is_another_one_each_epoch(store: SequenceStore) -> None:
    samples = TrainingSamples(store, LENGTH, 3, windows="all")
    assert sorted(samples.order(5).tolist()) == list(range(len(samples)))
    assert not np.array_equal(samples.order(5), samples.order(6))
    assert np.array_equal(samples.order(5), TrainingSamples(store, LENGTH, 3, windows="all").order(5))


def test_a_worker_without_a_sequence_counts_for_nothing(store: SequenceStore) -> None:
    samples = TrainingSamples(store, LENGTH, 0)
    parts = [samples.step(samples.order(0), 0, 2, rank, 3) for rank in range(3)]
    assert [part.weight for part in parts] == [1, 1, 0]
    assert len(parts[2].batch.items_T) > 0
    assert len({part.global_targets for part in parts}) == 1


def test_times_are_those_of_the_event_and_of_the_one_after(store: SequenceStore) -> None:
    samples = TrainingSamples(store, LENGTH, 0, prefixes=True, windows="all")
    batch = samples.step(np.arange(len(samples)), 0, len(samples), 0, 1).batch
    wanted = []
    for _, times in training(store):
        for stop in range(1, len(times)):
            start = max(0, stop - LENGTH)
            wanted += list(zip(times[start:stop], times[start + 1 : stop + 1], strict=True))
    assert batch.times_T is not None
    assert batch.next_times_T is not None
    assert list(zip(batch.times_T.tolist(), batch.next_times_T.tolist(), strict=True)) == wanted


def weights(samples: TrainingSamples) -> dict[int, list[float]]:
    """Place of the first target of a row in the store -> weights of the row's targets, over an epoch in one step."""
    step = samples.step(np.arange(len(samples)), 0, len(samples), 0, 1)
    found: dict[int, list[float]] = {}
    assert step.targets.weights_S is not None
    rows = np.arange(len(step.targets.items_S)) if step.targets.rows_S is None else step.targets.rows_S.numpy()
    for row, weight in zip(rows.tolist(), step.targets.weights_S.tolist(), strict=True):
        found.setdefault(row, []).append(weight)
    return found


def test_baskets_weigh_the_same_whatever_their_size(store: SequenceStore) -> None:
    of_rows = weights(TrainingSamples(store, 100, 0, windows="all", target="next_basket", weigh="baskets"))
    totals = [sum(row) for row in of_rows.values()]
    assert len({len(row) for row in of_rows.values()}) > 1
    assert totals == pytest.approx([totals[0]] * len(totals))
    assert np.mean([weight for row in of_rows.values() for weight in row]) == pytest.approx(1)


def test_a_target_weighs_half_as_much_as_one_a_half_life_younger(store: SequenceStore) -> None:
    seconds_a_day = 86_400  # the times of this log are 0 to 7 seconds
    samples = TrainingSamples(store, 100, 0, windows="all", half_life_days=2 / seconds_a_day)
    step = samples.step(np.arange(len(samples)), 0, len(samples), 0, 1)
    assert step.targets.weights_S is not None
    assert step.batch.next_times_T is not None
    for early in range(6):
        old, young = (
            step.targets.weights_S[step.batch.next_times_T == time * 1_000_000] for time in (early, early + 2)
        )
        if len(old) and len(young):
            assert float(young[0] / old[0]) == pytest.approx(2, rel=1e-4)
    assert float(step.targets.weights_S.mean()) == pytest.approx(1, rel=1e-4)


def test_until_test_the_validation_target_is_trained_on(store: SequenceStore) -> None:
    before, after = (TrainingSamples(store, 100, 0, until=until) for until in ("validation", "test"))
    with_targets = int((store.train_end < np.diff(store.offsets)).sum())
    alone = int(((store.train_end == 1) & (np.diff(store.offsets) == 3)).sum())
    assert after.targets - before.targets == with_targets
    assert len(after) - len(before) == alone
