"""RepeatHead: how likely an item of the history comes again, from when and how often it came.

Personal frequency and recency are the rows to beat on purchase logs. This head learns from the same facts, and its
scores are added to those of the model, so that one softmax weighs repeats against new items.
Shapes: T packed events, P asked events, A pairs (asked event, event before it), M pairs (asked event, item), D hidden.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqray.models.items import DAY, ItemTable, is_known
from seqray.models.protocol import HistoryScores
from seqray.sequences import Batch

FACTS, UNTIMED = 9, 6
"""Facts of a pair, and those among them that need no times."""


class Pairs(NamedTuple):
    """Each asked event with each event up to it: indices into P and T."""

    row_A: Tensor
    event_A: Tensor


class RepeatHead(nn.Module):
    """A small network over the facts of (asked event, item), the item's own habit and the hidden state's."""

    def __init__(self, num_items: int, hidden_dim: int, habit_dim: int = 8, width: int = 32) -> None:
        super().__init__()
        self.item_habit = ItemTable(num_items, habit_dim)
        self.user_habit = nn.Linear(hidden_dim, habit_dim)
        self.expand = nn.Linear(FACTS + 2 * habit_dim, width)
        self.middle = nn.Linear(width, width)
        self.contract = nn.Linear(width, 1)

    def forward(self, batch: Batch, hidden_PD: Tensor, basket_T: Tensor) -> HistoryScores:
        """basket_T: number of the event's basket, ascending through the batch."""
        pairs = asked_pairs(batch)
        size = int(batch.items_T.max()) + 1
        key_M, place_A = torch.unique(pairs.row_A * size + batch.items_T[pairs.event_A], return_inverse=True)
        row_M, item_M = key_M // size, key_M % size
        facts_MF = repeat_facts(batch, pairs, place_A, row_M, basket_T)
        habits = [self.item_habit(item_M), self.user_habit(hidden_PD)[row_M]]
        inner = nn.functional.gelu(self.expand(torch.cat([facts_MF.to(hidden_PD.dtype), *habits], 1)))
        inner = nn.functional.gelu(self.middle(inner))
        return HistoryScores(row_M, item_M, self.contract(inner).squeeze(1).float())


def asked_pairs(batch: Batch) -> Pairs:
    """All pairs of an asked event and an event of its sequence that is not after it."""
    T = len(batch.items_T)
    device = batch.items_T.device
    asked_P = batch.asked_places()
    start_T = torch.repeat_interleave(batch.lengths_B.cumsum(0) - batch.lengths_B, batch.lengths_B, output_size=T)
    count_P = asked_P - start_T[asked_P] + 1
    row_A = torch.repeat_interleave(torch.arange(len(asked_P), device=device), count_P)
    before_P = count_P.cumsum(0) - count_P
    event_A = torch.arange(len(row_A), device=device) + (start_T[asked_P] - before_P)[row_A]
    return Pairs(row_A, event_A)


def repeat_facts(batch: Batch, pairs: Pairs, place_A: Tensor, row_M: Tensor, basket_T: Tensor) -> Tensor:
    """facts_MF in float32, each of the order of 1: counts, shares, and times since, in baskets and in days."""
    asked_P = batch.asked_places()
    P, M = len(asked_P), len(row_M)
    ago_A = (basket_T[asked_P][pairs.row_A] - basket_T[pairs.event_A]).float()
    baskets_P = _segment(ago_A, pairs.row_A, P, "amax") + 1
    count_M = torch.bincount(place_A, minlength=M).float()
    newest_M, oldest_M = _segment(ago_A, place_A, M, "amin"), _segment(ago_A, place_A, M, "amax")
    mean_gap_M = (oldest_M - newest_M) / (count_M - 1).clamp(min=1)
    facts = [
        count_M.log(),
        count_M / baskets_P[row_M],
        baskets_P[row_M].log(),
        (1 + newest_M).log(),
        (1 + mean_gap_M).log() * (count_M > 1),
        (count_M > 1).float(),
    ]
    if batch.times_T is None or batch.next_times_T is None:
        return torch.stack([*facts, *[torch.zeros_like(count_M)] * (FACTS - UNTIMED)], 1)
    later_A, earlier_A = batch.next_times_T[asked_P][pairs.row_A], batch.times_T[pairs.event_A]
    days_A = (later_A - earlier_A).double().div(DAY).float().clamp(min=0)
    newest_M, oldest_M = _segment(days_A, place_A, M, "amin"), _segment(days_A, place_A, M, "amax")
    mean_gap_M = (oldest_M - newest_M) / (count_M - 1).clamp(min=1)
    facts += [
        (1 + newest_M).log() / 2,
        (1 + mean_gap_M).log() / 2 * (count_M > 1),
        ((1 + newest_M) / (1 + mean_gap_M)).log() * (count_M > 1),
    ]
    known_M = is_known(batch.times_T[asked_P])[row_M].float()
    return torch.stack([*facts[:UNTIMED], *(fact * known_M for fact in facts[UNTIMED:])], 1)


def _segment(values_A: Tensor, segment_A: Tensor, count: int, how: str) -> Tensor:
    return values_A.new_zeros(count).scatter_reduce(0, segment_A, values_A, how, include_self=False)
