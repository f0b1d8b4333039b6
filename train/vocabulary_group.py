"""The workers that share out the rows of the item tables, and what they send each other.

All workers stand in a mesh of (data, vocabulary): `train.vocabulary_parallel` neighbours are a group that holds the
tables once, and the groups are copies of each other. Each worker of a group reads sequences of its own in training, so
rows are asked for and hidden states are scored in groups: what is gathered is as long as the batch of the group, never
as the tables. Shapes: R rows of one worker, G rows of the group, X anything, W workers of a group, V items + padding.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from seqray.errors import ConfigError
from train.place import Place

# The second names are those of before torch 2.13, which warns of them.
_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Sizes:
    """How many rows each worker of the group brings along."""

    each: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """This worker's rows among those of the group."""
        return slice(sum(self.each[: self.rank]), sum(self.each[: self.rank + 1]))


class VocabularyGroup:
    """One worker's place in its group."""

    def __init__(self, place: Place, size: int) -> None:
        """ConfigError when the workers cannot be put into groups of this size."""
        if place.world % size:
            raise ConfigError(f"train.vocabulary_parallel: {size} does not divide the {place.world} workers")
        mesh = init_device_mesh(
            place.device.type, (place.world // size, size), mesh_dim_names=("data", "vocabulary")
        )  # fmt: skip
        self.size, self.copies, self.device = size, place.world // size, place.device
        self.copy, self.rank = divmod(place.rank, size)
        self._group: Any = mesh.get_group("vocabulary")
        self._same_rows: Any = mesh.get_group("data")

    @classmethod
    def of(cls, place: Place, size: int) -> "VocabularyGroup | None":
        """None where each worker holds the tables."""
        return cls(place, size) if size > 1 else None

    def rows(self, num_rows: int, rank: int | None = None) -> slice:
        """The rows of a table that this worker (or `rank` of the group) holds: equal shares but for one row."""
        rank = self.rank if rank is None else rank
        return slice(num_rows * rank // self.size, num_rows * (rank + 1) // self.size)

    def most_rows(self, num_rows: int) -> int:
        """Of any worker of the group."""
        return -(-num_rows // self.size)

    def sizes(self, *own: int) -> list[Sizes]:
        """For each number of rows that this worker has, those of the whole group."""
        mine = torch.tensor(own, device=self.device)
        each = mine.new_empty(self.size * len(own))
        _gather(each, mine, group=self._group)
        return [Sizes(tuple(column), self.rank) for column in each.view(self.size, -1).T.tolist()]

    def gather(self, own_RX: Tensor, sizes: Sizes) -> Tensor:
        """(R, X) of each worker -> (G, X), in the order of the workers."""
        longest = max(1, *sizes.each)
        padded_RX = own_RX.new_zeros(longest, *own_RX.shape[1:])
        padded_RX[: len(own_RX)] = own_RX
        all_WRX = own_RX.new_empty(self.size * longest, *own_RX.shape[1:])
        _gather(all_WRX, padded_RX, group=self._group)
        return torch.cat([part[:count] for part, count in zip(torch.split(all_WRX, longest), sizes.each, strict=True)])

    def sum_own(self, all_GX: Tensor, sizes: Sizes) -> Tensor:
        """(G, X) -> (R, X): this worker's rows, summed over the group."""
        longest = max(1, *sizes.each)
        padded_WRX = all_GX.new_zeros(self.size * longest, *all_GX.shape[1:])
        for rank, (end, count) in enumerate(zip(accumulate(sizes.each), sizes.each, strict=True)):
            padded_WRX[rank * longest : rank * longest + count] = all_GX[end - count : end]
        own_RX = all_GX.new_empty(longest, *all_GX.shape[1:])
        _reduce(own_RX, padded_WRX, group=self._group)
        return own_RX[: sizes.each[self.rank]]

    def stack(self, own: Tensor) -> Tensor:
        """(X) of one shape on each worker -> (W, X)."""
        stacked = own.new_empty(self.size, *own.shape)
        _gather(stacked.flatten(0, 1), own.contiguous(), group=self._group)
        return stacked

    def sum_(self, tensor: Tensor) -> Tensor:
        """Summed over the group, in place."""
        dist.all_reduce(tensor, group=self._group)
        return tensor

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of the group, in place."""
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor

    def sum_copies_(self, tensor: Tensor) -> Tensor:
        """Summed over the workers that hold the same rows, in place."""
        dist.all_reduce(tensor, group=self._same_rows)
        return tensor

    def sum_over_copies(self, tensor: Tensor) -> Tensor:
        """The same for a tensor on any device, as a new one."""
        return self.sum_copies_(tensor.to(self.device, copy=True)).to(tensor.device)

    def whole(self, own: Tensor, num_rows: int) -> Tensor | None:
        """A table in the CPU memory of the first worker, None elsewhere; the rows of one worker travel at a time."""
        if self.copy:
            return None
        if self.rank:
            dist.send(own.contiguous(), dst=0)
            return None
        table = torch.empty(num_rows, *own.shape[1:], dtype=own.dtype)
        table[self.rows(num_rows)] = own.cpu()
        for rank in range(1, self.size):
            rows = self.rows(num_rows, rank)
            given = own.new_empty(rows.stop - rows.start, *own.shape[1:])
            dist.recv(given, src=rank)
            table[rows] = given.cpu()
        return table

    def fill_(self, own: Tensor, table: Tensor | None, num_rows: int) -> None:
        """Fills this worker's rows from the first worker's table."""
        if self.copy == 0 and self.rank == 0 and table is not None:
            own.copy_(table[self.rows(num_rows)])
            for rank in range(1, self.size):
                dist.send(table[self.rows(num_rows, rank)].to(own), dst=rank)
        elif self.copy == 0:
            dist.recv(own, src=0)
        dist.broadcast(own, src=self.rank, group=self._same_rows)
