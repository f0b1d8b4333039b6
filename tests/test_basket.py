"""The model over baskets and its head for repeat purchases."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from seqray.catalogue import Catalogue
from seqray.conformance import check_model
from seqray.errors import ConfigError
from seqray.full_softmax import full_cross_entropy
from seqray.model_sections import BasketConfig
from seqray.models.basket import BasketTransformer, baskets
from seqray.models.items import DAY
from seqray.models.protocol import Module, build_model, predict
from seqray.models.repeat import asked_pairs, repeat_facts
from seqray.samples import Targets
from seqray.sequences import UNKNOWN_TIME, Batch

NUM_ITEMS = 40
CONFIG = BasketConfig(hidden_dim=16, num_blocks=1, dropout=0.0, max_length=12, time_gap=True, season=True)


def model(config: BasketConfig = CONFIG) -> Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(config, Catalogue(NUM_ITEMS)).eval()


def batch(*histories: list[tuple[int, int]], now: int = 100) -> Batch:
    """Histories of (item, day)."""
    items = [item for history in histories for item, _ in history]
    days = [day for history in histories for _, day in history]
    after = [day for history in histories for day in [*[day for _, day in history[1:]], now]]
    lengths = torch.tensor([len(history) for history in histories])
    times, next_times = (torch.tensor(part) * DAY for part in (days, after))
    return Batch(torch.tensor(items), lengths, None, times, next_times).ask_last()


def scores(of: Module, histories: Batch) -> Tensor:
    return predict(of, histories).scores().detach()


def test_conformance() -> None:
    check_model(CONFIG)


def test_events_of_one_time_are_a_basket_and_those_without_time_are_alone() -> None:
    basket_T, ends_K, lengths_B = baskets(batch([(1, 1), (2, 1), (3, 5)], [(4, 5), (5, 5)]))
    assert basket_T.tolist() == [0, 0, 1, 2, 2]
    assert ends_K.tolist() == [1, 2, 4]
    assert lengths_B.tolist() == [2, 1]
    unknown = torch.full((2,), UNKNOWN_TIME)
    untimed = Batch(torch.tensor([1, 2]), torch.tensor([2]), None, unknown, unknown)
    assert baskets(untimed)[0].tolist() == [0, 1]


def test_the_order_inside_a_basket_means_nothing() -> None:
    one = scores(model(), batch([(1, 1), (2, 1), (3, 5), (4, 5)]))
    other = scores(model(), batch([(2, 1), (1, 1), (4, 5), (3, 5)]))
    assert torch.allclose(one, other, atol=1e-5)


def test_a_question_inside_a_basket_is_refused() -> None:
    inside = replace(batch([(1, 1), (2, 1), (3, 5)]), asked_P=torch.tensor([0, 2]))
    with pytest.raises(ConfigError, match="next_basket"):
        model().encode(inside)


def test_times_count_and_only_where_they_are_known() -> None:
    timed = batch([(1, 1), (2, 9), (1, 30)])
    assert not torch.allclose(scores(model(), timed), scores(model(), batch([(1, 1), (2, 9), (1, 30)], now=400)))
    unknown = torch.full((3,), UNKNOWN_TIME)
    untimed = Batch(timed.items_T, timed.lengths_B, timed.asked_P, unknown, unknown)
    alone = scores(model(), Batch(timed.items_T, timed.lengths_B, timed.asked_P))
    assert torch.allclose(scores(model(), untimed), alone, atol=1e-5)


def test_facts_of_repeats_against_a_slow_reference() -> None:
    histories = [[(7, 1), (3, 1), (7, 11), (7, 31), (5, 31)], [(9, 2), (9, 3)]]
    given = replace(batch(*histories), asked_P=torch.tensor([1, 2, 4, 6]))
    pairs = asked_pairs(given)
    key_M, place_A = torch.unique(pairs.row_A * 64 + given.items_T[pairs.event_A], return_inverse=True)
    facts_MF = repeat_facts(given, pairs, place_A, key_M // 64, baskets(given)[0])
    found = dict(zip(((int(key) // 64, int(key) % 64) for key in key_M), facts_MF, strict=True))
    assert sorted(found) == [(0, 3), (0, 7), (1, 3), (1, 7), (2, 3), (2, 5), (2, 7), (3, 9)]
    # Of item 7 after the third basket: 3 times in 3 baskets, newest in this one, a basket and 15 days apart.
    days = (100 - 31, 15.0)
    wanted = [np.log(3), 1.0, np.log(3), np.log(1), np.log(2), 1.0]
    wanted += [np.log1p(days[0]) / 2, np.log1p(days[1]) / 2, np.log((1 + days[0]) / (1 + days[1]))]
    assert found[2, 7].tolist() == pytest.approx(wanted, abs=1e-5)
    once = [np.log(1), 1 / 3, np.log(3), np.log(3), 0.0, 0.0, np.log1p(99) / 2, 0.0, 0.0]
    assert found[2, 3].tolist() == pytest.approx(once, abs=1e-5)


def test_the_head_learns_that_people_buy_again_what_they_bought_often() -> None:
    """Of users with a favourite each it learns a habit that holds for favourites it never saw in training."""
    random = np.random.default_rng(0)

    def shoppers(favourites: list[int]) -> Batch:
        others = random.integers(1, NUM_ITEMS + 1, (len(favourites), 3))
        rows = [[(int(o), day) for day, o in enumerate(other)] for other in others]
        return batch(
            *([*row, *[(item, 3 + day) for day in range(3)]] for item, row in zip(favourites, rows, strict=True))
        )

    shopper, seen = model().train(), list(range(1, NUM_ITEMS // 2))
    optimizer = torch.optim.Adam(shopper.parameters(), 0.01)
    for _ in range(40):
        targets = Targets(torch.tensor(seen), None, torch.arange(len(seen)))
        loss = full_cross_entropy(predict(shopper, shoppers(seen)), targets, 1000)
        torch.autograd.backward(loss / len(seen))
        optimizer.step()
        optimizer.zero_grad()
    unseen = list(range(NUM_ITEMS // 2, NUM_ITEMS + 1))
    assert isinstance(shopper, BasketTransformer)
    assert scores(shopper.eval(), shoppers(unseen)).argmax(1).tolist() == unseen
