"""The objective as it lies on the workers: DDP or FSDP2, from the config alone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from seqray.evaluation import Part, evaluate, prediction_scorer
from seqray.program_config import EvaluateConfig, TrainConfig
from seqray.samples import Step
from seqray.sequences import Queries
from train.blocks import blocks_of
from train.objective import Objective
from train.place import Place, sum_over_workers


class Parallel:
    """Loss, gradients and evaluation of a model that several workers train together.

    The model is moved to its device here, block by block, and its weights may be replaced: build the optimizer
    afterwards. What it holds as a whole is `train.layout`'s business.
    """

    def __init__(self, objective: Objective, place: Place, config: TrainConfig) -> None:
        self._plain, self._objective = objective, spread(objective, place, config)
        self.part = Part(
            place.rank, place.world, sum_over_workers(place), together=isinstance(self._objective, FSDPModule)
        )  # fmt: skip
        """This worker's share of each batch."""
        self.device = place.device

    def train(self) -> None:
        """Turns dropout on."""
        self._objective.train()

    def loss(self, step: Step, key: tuple[int, int, int]) -> Tensor:
        """The loss summed over this worker's targets; key: (seed, epoch, step)."""
        loss: Tensor = self._objective(step, key)
        return loss * step.weight

    def backward(self, loss: Tensor, step: Step) -> None:
        """Adds to the gradients: of the mean over the targets of all workers."""
        # DDP and FSDP take the mean of the gradients over workers; the loss is the sum over all targets of the step.
        torch.autograd.backward(loss * (self.part.world / step.global_targets))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """In here losses and gradients are added up on each worker alone."""
        if isinstance(self._objective, DistributedDataParallel):
            with self._objective.no_sync():
                yield
        elif isinstance(self._objective, FSDPModule):
            self._objective.set_requires_gradient_sync(False)
            yield
            self._objective.set_requires_gradient_sync(True)
        else:
            yield

    def clip(self, norm: float) -> Tensor:
        """Scales all gradients down where together they are longer than `norm`; gives back how long they were."""
        weights = [weight for weight in self._plain.parameters() if weight.grad is not None]
        if not isinstance(self._objective, FSDPModule):
            return nn.utils.clip_grad_norm_(weights, norm)
        parts = [_local(weight.grad) for weight in weights if weight.grad is not None]
        square = torch.stack([part.double().square().sum() for part in parts]).sum()
        dist.all_reduce(square)
        length = square.sqrt()
        scale = (norm / (length + 1e-6)).clamp(max=1.0)  # as nn.utils.clip_grad_norm_
        for part in parts:
            part.mul_(scale.to(part.dtype))
        return length

    def evaluate(self, queries: Queries, config: EvaluateConfig, num_items: int) -> dict[str, float]:
        """The metrics over all queries, ranked by all workers together."""
        self._plain.eval()
        scorer = prediction_scorer(self._plain.answer, self._plain.model.max_length, self.device)
        found = evaluate(scorer, queries, config, num_items, self.part)
        for module in self._plain.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was gathered would not see weights that are loaded later
        return found


def spread(objective: Objective, place: Place, config: TrainConfig) -> nn.Module:
    """The objective, or what stands for it, on its device and in step with the other workers."""
    if place.world == 1:
        return objective.to(place.device)
    if config.parallel == "ddp":
        return DistributedDataParallel(objective.to(place.device), gradient_as_bucket_view=True)
    mesh = init_device_mesh(place.device.type, (place.world,))
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh)
    # What is outside of the blocks, the item table above all, is needed from the first layer to the loss.
    fully_shard(objective, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(objective, "answer")
    return objective


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
