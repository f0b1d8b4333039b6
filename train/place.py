"""This worker among all workers, and what they do together that is no part of a step."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """This worker among all workers."""

    rank: int
    world: int
    device: torch.device


def sum_over_workers(place: Place) -> Callable[[Tensor], Tensor]:
    """Adds a tensor of whole numbers or a loss over all workers; a single worker keeps its own."""

    def add(tensor: Tensor) -> Tensor:
        if place.world == 1:
            return tensor
        total = tensor.to(place.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    return add
