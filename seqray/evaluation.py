"""Full-catalogue ranking of a model or a baseline, in fixed batches that workers share out among them.

Shapes: B queries, V items + padding, K cut-offs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from seqray.baselines import Baselines
from seqray.errors import ModelError
from seqray.metrics import RankCounts, rank_metrics
from seqray.models.protocol import Prediction, SequentialModel, predict
from seqray.program_config import EvaluateConfig
from seqray.ranking import mask_scores, ranks_among, top_k
from seqray.sequences import Batch, Queries, SequenceStore, Split

Scorer = Callable[[Queries], Tensor]
Predictor = Callable[[Batch, Tensor | None], Prediction]
"""Asked for histories and given item weights that are at hand, or None."""


class Best(NamedTuple):
    """The best items of some queries."""

    items_BK: Tensor
    """Best first, equally good ones by item_index; 0 where there are fewer."""
    finite: bool
    """Whether all scores were numbers."""


Ranker = Callable[[Queries, int, bool], Best]
"""(queries, k, exclude_seen) -> the k best items of each."""
SumOverWorkers = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Part:
    """This process's share of the work, and how integer tensors are summed over all of them."""

    rank: int = 0
    world: int = 1
    sum_over_workers: SumOverWorkers = lambda tensor: tensor
    together: bool = False
    """A batch is scored by all processes at once, so that one without a batch scores another for nothing."""

    def starts(self, total: int, size: int) -> Iterator[tuple[int, bool]]:
        """(where it starts, whether it counts here) of each batch that this process scores."""
        starts = range(0, total, size)
        yield from ((start, True) for start in starts[self.rank :: self.world])
        if self.together and self.rank >= len(starts) % self.world > 0:
            yield 0, False


def evaluate(
    scorer: Scorer, queries: Queries, config: EvaluateConfig, num_items: int, part: Part | None = None
) -> dict[str, float]:
    """`evaluate_ranker` of scores_BV, larger is better."""
    return evaluate_ranker(partial(rank_scores, scorer), queries, config, num_items, part)


def evaluate_ranker(
    ranker: Ranker, queries: Queries, config: EvaluateConfig, num_items: int, part: Part | None = None
) -> dict[str, float]:
    """hit_rate@k, ndcg@k, mrr@k (recall@k for baskets) and coverage@k of `ranker` over all queries.

    Batches are the same whatever the number of workers, and what is summed over workers are whole numbers, so the
    result is the same to the last bit. ModelError on scores that are no numbers.
    """
    part = part or Part()
    most_targets = 1
    if queries.are_baskets and len(queries):
        query_P, _ = queries.targets()
        most_targets = int(torch.bincount(query_P).max())
    counts = RankCounts.empty(max(config.k), most_targets)
    shown_KV = torch.zeros(len(config.k), num_items + 1, dtype=torch.int64)
    no_numbers = torch.zeros(1, dtype=torch.int64)
    for start, counts_here in part.starts(len(queries), config.batch_size):
        some = queries.slice(start, start + config.batch_size)
        best = ranker(some, max(config.k), config.exclude_seen)
        if not counts_here:
            continue
        no_numbers += int(not best.finite)
        best_BK = best.items_BK.cpu()
        query_P, item_P = some.targets()
        counts.add(ranks_among(best_BK, query_P, item_P), query_P, len(some))
        for row, k in enumerate(config.k):
            shown_KV[row, best_BK[:, :k].flatten()] = 1
    if int(part.sum_over_workers(no_numbers)):
        raise ModelError("the model's scores are not finite: try a lower train.learning_rate or train.precision=fp32")
    counts = RankCounts(part.sum_over_workers(counts.first_R), part.sum_over_workers(counts.all_SR))
    shown_K = (part.sum_over_workers(shown_KV)[:, 1:] > 0).sum(1)
    coverage = {f"coverage@{k}": int(n) / num_items for k, n in zip(config.k, shown_K, strict=True)}
    return rank_metrics(counts, config.k, baskets=queries.are_baskets) | coverage


def rank_scores(scorer: Scorer, queries: Queries, k: int, exclude_seen: bool) -> Best:
    """The ranker of a scorer, with its first argument given."""
    scores_BV = scorer(queries)
    finite = bool(scores_BV.sum().isfinite())  # one pass; a sum with a bad number in it is bad
    nothing = torch.empty(0, dtype=torch.int64)
    seen = queries.seen() if exclude_seen else (nothing, nothing)
    mask_scores(scores_BV, *(pair.to(scores_BV.device) for pair in seen))
    return Best(top_k(scores_BV, k)[0], finite)


def model_scorer(model: SequentialModel, device: torch.device) -> Scorer:
    """Scores of a model in evaluation mode, in float32."""
    return prediction_scorer(torch.no_grad()(partial(predict, model)), model.max_length, device)


def prediction_scorer(predictor: Predictor, max_length: int, device: torch.device) -> Scorer:
    """Scores of what answers batches, in float32; its item weights are those of its first answer."""
    weights_VD: Tensor | None = None

    def score(queries: Queries) -> Tensor:
        nonlocal weights_VD
        prediction = predictor(queries.history(max_length).to(device), weights_VD)
        if weights_VD is None:
            weights_VD = prediction.weights_VD.float()
        return prediction.scores()

    return score


def evaluate_baselines(store: SequenceStore, split: Split, config: EvaluateConfig) -> dict[str, dict[str, float]]:
    """The metrics of each baseline, with keys such as `test/ndcg@10`."""
    baselines = Baselines(store, split, config.popularity_window_days)
    queries = store.queries(split)

    def row(name: str) -> dict[str, float]:
        return with_split(evaluate(partial(baselines.scores, name), queries, config, store.num_items), split)

    return {name: row(name) for name in baselines.names()}


def with_split(metrics: dict[str, float], split: Split) -> dict[str, float]:
    """`ndcg@10` -> `test/ndcg@10`."""
    return {f"{split}/{key}": value for key, value in metrics.items()}
