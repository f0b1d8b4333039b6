"""The state of model and optimizer as whole tensors, however it lies on the workers.

`whole_model` and `whole_slots` give it by the names that a single process has, as copies in the CPU memory of the first
worker that training no longer changes; the other workers get nothing. `load_model` and `load_slots` take it from the
first worker back into whatever layout there is now. So checkpoints and bundles know neither the number of workers nor
train.parallel or train.vocabulary_parallel. All workers call these functions, in the same order.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.item_shards import ItemShard, shards_of
from train.place import from_first, is_first

Tensors = dict[str, Tensor]


def whole_model(model: nn.Module) -> Tensors:
    """The state by name."""
    shards = shards_of(model)
    gathered = ((name, _whole(tensor, shards.get(name))) for name, tensor in model.state_dict().items())
    return {name: tensor for name, tensor in gathered if tensor is not None}


def whole_slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What the optimizer keeps for each weight, as `<name of the weight>.<slot>`; empty before its first step."""
    found: Tensors = {}
    for name, weight, shard in _learnt(model, optimizer):
        for slot, value in optimizer.state.get(weight, {}).items():
            here = torch.as_tensor(value)
            whole = _whole(here, shard if here.shape == weight.shape else None)
            if whole is not None:
                found[f"{name}.{slot}"] = whole
    return found


@torch.no_grad()
def load_model(model: nn.Module, state: Tensors) -> None:
    """Takes the first worker's state."""
    shards = shards_of(model)
    for name, here in model.state_dict().items():
        _fill(here, state.get(name), shards.get(name))


@torch.no_grad()
def load_slots(model: nn.Module, optimizer: torch.optim.Optimizer, slots: Tensors) -> None:
    """Takes the first worker's slots of the optimizer."""
    known = from_first({name: (tensor.shape, tensor.dtype) for name, tensor in slots.items()})
    weights = {name: (weight, shard) for name, weight, shard in _learnt(model, optimizer)}
    optimizer.state.clear()
    for name, (shape, dtype) in known.items():
        of_weight, _, slot = name.rpartition(".")
        weight, shard = weights[of_weight]
        if shape == _whole_shape(weight, shard):  # it lies as the weight does
            here = torch.zeros_like(weight, requires_grad=False)
        else:
            here, shard = torch.zeros(shape, dtype=dtype, device=weight.device), None
        _fill(here, slots.get(name), shard)
        optimizer.state[weight][slot] = here


def held_here(model: nn.Module) -> int:
    """Numbers of the weights that this worker holds."""
    local = (weight.to_local() if isinstance(weight, DTensor) else weight for weight in model.parameters())
    return sum(weight.numel() for weight in local)


def misfit(model: nn.Module, optimizer: torch.optim.Optimizer, state: Tensors, best: Tensors, slots: Tensors) -> str:
    """Why a whole state is not of this model and optimizer; empty when it is. Needs no other worker."""
    shards = shards_of(model)
    here = {name: _whole_shape(tensor, shards.get(name)) for name, tensor in model.state_dict().items()}
    if any({name: tensor.shape for name, tensor in given.items()} != here for given in (state, best or state)):
        return "its weights are not of this model"
    learnt = {name for name, _, _ in _learnt(model, optimizer)}
    if slots and {name.rpartition(".")[0] for name in slots} != learnt:
        return "its optimizer is not of this model"
    return ""


def _learnt(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter, ItemShard | None]]:
    """(name, weight, shard that it belongs to) of every weight of the optimizer, in the model's order."""
    learnt, shards = {weight for group in optimizer.param_groups for weight in group["params"]}, shards_of(model)
    return ((name, weight, shards.get(name)) for name, weight in model.named_parameters() if weight in learnt)


def _whole_shape(here: Tensor, shard: ItemShard | None) -> torch.Size:
    return here.shape if shard is None else torch.Size((shard.num_rows, *here.shape[1:]))


def _whole(here: Tensor, shard: ItemShard | None) -> Tensor | None:
    """The whole tensor in the first worker, None in the others."""
    if shard is not None:
        return shard.group.whole(here.detach(), shard.num_rows)
    whole = here.full_tensor() if isinstance(here, DTensor) else here
    return whole.detach().to("cpu", copy=True).contiguous() if is_first() else None


def _fill(here: Tensor, whole: Tensor | None, shard: ItemShard | None) -> None:
    """Fills a tensor, or this worker's part of it, with what the first worker has."""
    if shard is not None:
        shard.group.fill_(here, whole, shard.num_rows)
    elif isinstance(here, DTensor):
        given = torch.empty(here.shape, dtype=here.dtype, device=here.device)
        if whole is not None:
            given.copy_(whole)
        here.to_local().copy_(distribute_tensor(given, here.device_mesh, here.placements).to_local())
    else:
        if whole is not None:
            here.copy_(whole)
        if dist.is_initialized():
            dist.broadcast(here, src=0)
