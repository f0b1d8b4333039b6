"""The state of model and optimizer as whole tensors, however it lies on the workers.

`whole_model` and `whole_slots` give it by the names that a single process has, as copies in the CPU memory of the first
worker that training no longer changes; the other workers get nothing. `load_model` and `load_slots` take it from the
first worker back into whatever layout there is now. So checkpoints and bundles know neither the number of workers nor
train.parallel. All workers call these functions, in the same order.
"""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.place import from_first, is_first

Tensors = dict[str, Tensor]


def whole_model(model: nn.Module) -> Tensors:
    """The state by name."""
    return _gathered(model.state_dict())


def whole_slots(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """What the optimizer keeps for each weight, as `<name of the weight>.<slot>`; empty before its first step."""
    return _gathered({
        f"{name}.{slot}": torch.as_tensor(value)
        for name, weight in _learnt(model, optimizer)
        for slot, value in optimizer.state.get(weight, {}).items()
    })  # fmt: skip


@torch.no_grad()
def load_model(model: nn.Module, state: Tensors) -> None:
    """Takes the first worker's state."""
    for name, here in model.state_dict().items():
        _fill(here, state.get(name))


@torch.no_grad()
def load_slots(model: nn.Module, optimizer: torch.optim.Optimizer, slots: Tensors) -> None:
    """Takes the first worker's slots of the optimizer."""
    known = from_first({name: (tensor.shape, tensor.dtype) for name, tensor in slots.items()})
    weights = dict(_learnt(model, optimizer))
    optimizer.state.clear()
    for name, (shape, dtype) in known.items():
        of_weight, _, slot = name.rpartition(".")
        weight = weights[of_weight]
        lies_as_the_weight = shape == weight.shape
        here = torch.zeros_like(weight) if lies_as_the_weight else torch.zeros(shape, dtype=dtype, device=weight.device)
        _fill(here, slots.get(name))
        optimizer.state[weight][slot] = here


def misfit(model: nn.Module, optimizer: torch.optim.Optimizer, state: Tensors, best: Tensors, slots: Tensors) -> str:
    """Why a whole state is not of this model and optimizer; empty when it is. Needs no other worker."""
    here = _shapes(model.state_dict())
    if _shapes(state) != here or (best and _shapes(best) != here):
        return "its weights are not of this model"
    learnt = {name for name, _ in _learnt(model, optimizer)}
    if slots and {name.rpartition(".")[0] for name in slots} != learnt:
        return "its optimizer is not of this model"
    return ""


def _learnt(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    """(name, weight) of every weight of the optimizer, in the model's order."""
    learnt = {weight for group in optimizer.param_groups for weight in group["params"]}
    return ((name, weight) for name, weight in model.named_parameters() if weight in learnt)


def _gathered(tensors: Tensors) -> Tensors:
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if is_first():
            found[name] = whole.detach().to("cpu", copy=True).contiguous()
    return found


def _fill(here: Tensor, whole: Tensor | None) -> None:
    """Fills a tensor, or this worker's part of it, with what the first worker has."""
    if not isinstance(here, DTensor):
        if whole is not None:
            here.copy_(whole)
        if dist.is_initialized():
            dist.broadcast(here, src=0)
        return
    given = torch.empty(here.shape, dtype=here.dtype, device=here.device)
    if whole is not None:
        given.copy_(whole)
    here.to_local().copy_(distribute_tensor(given, here.device_mesh, here.placements).to_local())


def _shapes(tensors: Tensors) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}
