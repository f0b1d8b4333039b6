"""This worker among all workers, and what they do together that is no part of a step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Plain = TypeVar("Plain")


@dataclass(frozen=True)
class Place:
    """This worker among all workers."""

    rank: int
    world: int
    device: torch.device


def is_first() -> bool:
    """Whether this process is the first worker, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def from_first(value: Plain) -> Plain:
    """The first worker's value (plain data), in all of them; every worker calls it."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_over_workers(place: Place) -> Callable[[Tensor], Tensor]:
    """Adds a tensor of whole numbers or a loss over all workers; a single worker keeps its own."""

    def add(tensor: Tensor) -> Tensor:
        if place.world == 1:
            return tensor
        total = tensor.to(place.device, copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    return add
