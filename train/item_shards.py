"""ItemShard: the rows of an item table that one worker holds, in the place of the table.

Shapes: T packed events of one worker, G events of its group, V items + padding, v rows of this worker, D hidden.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from seqray.errors import ConfigError
from seqray.models.items import ItemTable
from seqray.models.protocol import SequentialModel
from train.vocabulary_group import Sizes, VocabularyGroup


class ItemShard(nn.Module):
    """Looks items up as the whole table does. In training each worker asks for items of its own; in evaluation all
    workers of the group ask for the same ones.
    """

    def __init__(self, table: ItemTable, group: VocabularyGroup) -> None:
        super().__init__()
        self.group, self.num_rows, self.rows = group, len(table.weight), group.rows(len(table.weight))
        rows_vD = table.weight.detach()[self.rows].to(group.device, copy=True)
        self.weight = nn.Parameter(rows_vD, requires_grad=table.weight.requires_grad)

    def forward(self, items_T: Tensor) -> Tensor:
        """(T, D) vectors of the items."""
        if self.training:
            return cast(Tensor, _Lookup.apply(self.weight, items_T, self.rows, self.group))  # type: ignore[no-untyped-call]
        return self.group.sum_(_local(self.weight, *_places(items_T, self.rows)))


def shard_tables(model: SequentialModel, group: VocabularyGroup) -> None:
    """Puts an ItemShard in the place of every ItemTable; ConfigError when the model scores by something else."""
    assert isinstance(model, nn.Module)
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, ItemTable):
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, ItemShard(module, group))
    shards = shards_of(model).values()
    with torch.no_grad():
        scored = len(model.item_weights())
    if not any(scored == len(shard.weight) < shard.num_rows for shard in shards):
        raise ConfigError(
            "train.vocabulary_parallel: the model's item_weights() are not the rows of a seqray.models.items.ItemTable"
        )


def shards_of(model: nn.Module) -> dict[str, ItemShard]:
    """The shards by the name of their weight in the state."""
    return {f"{name}.weight": part for name, part in model.named_modules() if isinstance(part, ItemShard)}


class _Lookup(torch.autograd.Function):
    """Each worker of the group gives the rows that it holds, for the items of all of them."""

    @staticmethod
    def forward(ctx: Any, weight_vD: Tensor, items_T: Tensor, rows: slice, group: VocabularyGroup) -> Tensor:
        (sizes,) = group.sizes(len(items_T))
        place_G, here_G = _places(group.gather(items_T, sizes), rows)
        ctx.save_for_backward(place_G, here_G)
        ctx.sizes, ctx.group, ctx.shape, ctx.first = sizes, group, weight_vD.shape, rows.start == 0
        return group.sum_own(_local(weight_vD, place_G, here_G), sizes)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        place_G, here_G = ctx.saved_tensors
        group: VocabularyGroup = ctx.group
        sizes: Sizes = ctx.sizes
        slope_GD = group.gather(slopes[0].contiguous(), sizes)
        slope_vD = slope_GD.new_zeros(ctx.shape).index_add_(0, place_G[here_G], slope_GD[here_G])
        if ctx.first:
            slope_vD[0] = 0  # padding
        return slope_vD, None, None, None


def _places(items: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """(row of each item here, whether it is one of them)."""
    place, here = items - rows.start, (items >= rows.start) & (items < rows.stop)
    return place.masked_fill(~here, 0), here


def _local(weight_vD: Tensor, place: Tensor, here: Tensor) -> Tensor:
    """The rows that are here, zeros for the others."""
    return weight_vD.detach()[place].masked_fill_(~here.unsqueeze(1), 0)
