"""Draws of a step: what is drawn for a target depends on (seed, epoch, step) and its place, not on who holds it.

Shapes: S targets of this worker, C of them, V items + padding, N negatives.
"""

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from seqray.catalogue import Catalogue
from seqray.errors import ConfigError
from seqray.samples import Step, Targets

WORD = 2**64
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SHARED, OWN, CHOICE, MASKS = range(4)


@dataclass(frozen=True)
class Sampler:
    """Where negatives come from: `count` of them, shared by all targets of a worker or drawn for each (`own`).

    in_batch: the items of this worker's targets. mixed: `uniform_share` uniform ones, the others in-batch
    (mixed negative sampling: Yang et al. 2020, "Mixed Negative Sampling for Learning Two-tower Neural Networks in
    Recommendations"). popularity: chances proportional to training events ** power.
    """

    count: int
    name: Literal["uniform", "popularity", "in_batch", "mixed"] = "uniform"
    own: bool = False
    power: float = 1.0
    uniform_share: float = 0.5

    @property
    def uniform_count(self) -> int:
        """How many of `count` are drawn uniformly."""
        return {"uniform": self.count, "mixed": round(self.count * self.uniform_share)}.get(self.name, 0)


class Popularity:
    """Chances of items by their training events; an item without any counts as if it had one.

    What can never be drawn would be missing from the estimate of a softmax over all items.
    """

    def __init__(self, train_events: ArrayLike) -> None:
        events = np.maximum(np.asarray(train_events, np.float64), 1)
        self._events_V = torch.from_numpy(np.concatenate([np.zeros(1), events]))
        self._chances: dict[tuple[float, torch.device], Tensor] = {}
        self._cumulative: dict[tuple[float, torch.device], Tensor] = {}

    @classmethod
    def of(cls, catalogue: Catalogue) -> Self | None:
        """From the item table's train_events; None without them."""
        if catalogue.items is None or "train_events" not in catalogue.items.column_names:
            return None
        return cls(catalogue.items.column("train_events").to_numpy())

    def chances(self, power: float, device: torch.device) -> Tensor:
        """chance_V, 0 for padding."""
        key = (power, device)
        if key not in self._chances:
            weight_V = self._events_V**power
            weight_V[0] = 0
            self._chances[key] = (weight_V / weight_V.sum()).to(device)
        return self._chances[key]

    def items(self, uniform: Tensor, power: float) -> Tensor:
        """The items that `uniform` numbers of [0, 1) stand for."""
        key = (power, uniform.device)
        if key not in self._cumulative:
            self._cumulative[key] = self.chances(*key).cumsum(0)
        cumulative_V = self._cumulative[key]
        return torch.searchsorted(cumulative_V, uniform * cumulative_V[-1], right=True).clamp_(
            max=len(cumulative_V) - 1
        )


class Negatives:
    """The draws of one step. Random numbers come from a hash of place and column (splitmix64: Steele et al. 2014, "Fast
    Splittable Pseudorandom Number Generators"), so each worker makes only its own, where its tensors are.
    """

    def __init__(
        self, key: tuple[int, int, int], num_items: int, targets: Targets, popularity: Popularity | None = None
    ) -> None:
        self._seed = 0
        for part in key:
            self._seed = _mixed(self._seed + part)
        self._num_items, self._targets, self._popularity = num_items, targets, popularity

    def shared(self, sampler: Sampler) -> Tensor:
        """item_N for all targets; fewer than `count` where the batch has fewer items to offer."""
        items_S = self._targets.items_S
        number_N = torch.arange(sampler.count, device=items_S.device)
        uniform = self.random(SHARED, number_N[: sampler.uniform_count], 1).squeeze(1)
        if sampler.name == "popularity":
            return self._popular().items(self.random(SHARED, number_N, 1).squeeze(1), sampler.power)
        order_S = self.random(CHOICE, self._targets.places_S, 1).squeeze(1).argsort()
        chosen = items_S[order_S[: sampler.count - sampler.uniform_count]]
        return torch.cat([self._item(uniform), chosen])

    def per_target(self, sampler: Sampler, part: slice = slice(None)) -> Tensor:
        """item_CN drawn for each of the targets in `part`."""
        items_S, split = self._targets.items_S, sampler.uniform_count
        uniform_CN = self.random(OWN, self._targets.places_S[part], sampler.count)
        if sampler.name == "popularity":
            return self._popular().items(uniform_CN, sampler.power)
        chosen = (uniform_CN[:, split:] * len(items_S)).long()
        return torch.cat([self._item(uniform_CN[:, :split]), items_S[chosen]], 1)

    def log_expected(self, sampler: Sampler, items: Tensor) -> Tensor:
        """Log of how often each of `items` is expected among a target's negatives, float32.

        An item is a target about as often as it has training events, which gives the chance of in-batch draws.
        """
        expected = torch.full_like(items, sampler.uniform_count / self._num_items, dtype=torch.float64)
        rest = sampler.count - sampler.uniform_count
        if rest and sampler.name != "popularity" and not sampler.own:
            rest = min(rest, len(self._targets.items_S))
        if rest:
            power = sampler.power if sampler.name == "popularity" else 1.0
            expected += rest * self._popular().chances(power, items.device)[items]
        return expected.log().float()

    def random(self, stream: int, places_S: Tensor, count: int) -> Tensor:
        """`count` uniform float64 of [0, 1) for each place; another `stream` gives others."""
        seed = _mixed(self._seed + (stream + 1) * GOLDEN)
        word = places_S.unsqueeze(1) * count + torch.arange(count, device=places_S.device)
        word.mul_(_signed(GOLDEN)).add_(_signed(seed))
        for shift, factor in ((30, FIRST), (27, SECOND)):
            word.bitwise_xor_(_shifted(word, shift)).mul_(_signed(factor))
        word.bitwise_xor_(_shifted(word, 31))
        return _shifted(word, 11).double().mul_(2.0**-53)

    def _item(self, uniform: Tensor) -> Tensor:
        return (uniform * self._num_items).long() + 1

    def _popular(self) -> Popularity:
        if self._popularity is None:
            raise ConfigError("loss.negatives: these need the train_events of an item table, and there is none")
        return self._popularity


def step_negatives(
    key: tuple[int, int, int], num_items: int, step: Step, popularity: Popularity | None = None
) -> Negatives:
    """The draws of a step; key: (seed, epoch, step)."""
    return Negatives(key, num_items, step.targets, popularity)


def _mixed(word: int) -> int:
    word = (word + GOLDEN) % WORD
    word = (word ^ word >> 30) * FIRST % WORD
    word = (word ^ word >> 27) * SECOND % WORD
    return word ^ word >> 31


def _signed(word: int) -> int:
    word %= WORD
    return word - WORD if word >= WORD // 2 else word


def _shifted(word: Tensor, by: int) -> Tensor:
    """The shift that brings in zeros, which int64 lacks."""
    return (word >> by).bitwise_and_((1 << 64 - by) - 1)
