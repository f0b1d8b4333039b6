"""Evaluation and baselines against a slow, plain ranking; bits that do not depend on workers."""

import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from shop_log import NUM_ITEMS, shop_config

from seqray.baselines import Baselines
from seqray.config import Config
from seqray.evaluation import Part, evaluate, evaluate_baselines, model_scorer
from seqray.models.protocol import build_model
from seqray.program_config import EvaluateConfig
from seqray.sequences import SequenceStore
from train.prepare import ensure_store


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return shop_config(tmp_path_factory.mktemp("shop"))


@pytest.fixture(scope="module")
def store(config: Config) -> SequenceStore:
    return ensure_store(config)


def histories(store: SequenceStore) -> list[list[int]]:
    return [store.items[a:b].tolist() for a, b in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


def plain_row(store: SequenceStore, exclude_seen: bool, k: int, name: str) -> tuple[float, float]:
    """(hit_rate@k, ndcg@k) on test of a baseline, written down anew with dictionaries and sorts."""
    popularity: Counter[int] = Counter()
    follows: dict[int, Counter[int]] = {}
    for history in histories(store):
        known = history[:-2]
        popularity.update(known)
        for a, b in pairwise(known):
            follows.setdefault(a, Counter())[b] += 1
    hits = gain = 0.0
    for history in histories(store):
        before, target = history[:-1], history[-1]
        own = {
            "popularity": Counter(),
            "markov_1": follows.get(before[-1], Counter()),
            "personal_frequency": Counter(before),
        }[name]
        items = [i for i in range(1, NUM_ITEMS + 1) if not (exclude_seen and i in before)]
        items.sort(key=lambda i: (-own[i], -popularity[i], i))
        rank = items.index(target) if target in items else NUM_ITEMS
        hits += rank < k
        gain += 1 / math.log2(rank + 2) if rank < k else 0
    users = len(histories(store))
    return hits / users, gain / users


@pytest.mark.parametrize("name", ["popularity", "markov_1", "personal_frequency"])
@pytest.mark.parametrize("exclude_seen", [True, False])
def test_baselines_equal_a_plain_ranking(store: SequenceStore, exclude_seen: bool, name: str) -> None:
    metrics = evaluate_baselines(store, "test", EvaluateConfig(k=(3,), exclude_seen=exclude_seen))[name]
    assert (metrics["test/hit_rate@3"], metrics["test/ndcg@3"]) == pytest.approx(
        plain_row(store, exclude_seen, 3, name)
    )


def test_windowed_popularity_counts_the_window_alone(store: SequenceStore) -> None:
    baselines = Baselines(store, "test", window_days=2.0)
    events, _ = store.events_before("test")
    times = store.timestamps[events]
    recent = store.items[events][times > times.max() - 2 * 86_400_000_000]
    score = baselines.scores("windowed_popularity", store.queries("test").slice(0, 1))[0]
    counted = (score // baselines._above).numpy()
    assert np.array_equal(counted, np.bincount(recent, minlength=NUM_ITEMS + 1))
    assert 0 < len(recent) < len(events)


def test_metrics_are_the_same_bits_for_any_number_of_workers(config: Config, store: SequenceStore) -> None:
    torch.manual_seed(0)
    scorer = model_scorer(build_model(config.model, store.catalogue).eval(), torch.device("cpu"))
    settings = EvaluateConfig(k=(5, 10), batch_size=7)
    queries = store.queries("test")
    alone = evaluate(scorer, queries, settings, store.num_items)
    tensors: list[list[torch.Tensor]] = [[], [], []]
    for rank in range(3):
        part = Part(rank, 3, lambda tensor, rank=rank: tensors[rank].append(tensor) or tensor)
        evaluate(scorer, queries, settings, store.num_items, part)
    summed = iter([sum(parts[1:], parts[0]) for parts in zip(*tensors, strict=True)])
    together = evaluate(scorer, queries.slice(0, 0), settings, store.num_items, Part(0, 1, lambda _: next(summed)))
    assert together == alone
    assert alone["coverage@10"] > 0
