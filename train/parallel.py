"""The objective as it lies on the workers: DDP or FSDP2, and the item tables whole or in shards."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from seqray.config import Config
from seqray.evaluation import Best, Part, Ranker, evaluate_ranker, prediction_scorer, rank_scores
from seqray.losses import build_loss
from seqray.models.protocol import Module
from seqray.negatives import Popularity
from seqray.program_config import EvaluateConfig, TrainConfig
from seqray.samples import Step
from seqray.sequences import Queries, SequenceStore
from train.blocks import blocks_of, checkpoint_blocks
from train.item_shards import shard_tables, shards_of
from train.objective import Objective
from train.place import Place, sum_over_workers
from train.sharded_ranking import sharded_ranker
from train.sharded_softmax import sharded_loss
from train.vocabulary_group import VocabularyGroup


class Parallel:
    """Loss, gradients and evaluation of a model that several workers train together.

    The model is moved to its device here, block by block, and its weights may be replaced: build the optimizer
    afterwards. What it holds as a whole is `train.layout`'s business.
    """

    def __init__(
        self, objective: Objective, place: Place, config: TrainConfig, group: VocabularyGroup | None = None
    ) -> None:
        """group: shares out the item tables, whose loss `objective` then has; None where each worker holds them."""
        self.device, self._group, self._plain = place.device, group, objective
        if group is not None:
            shard_tables(objective.model, group)
        self._shards = shards_of(objective)
        self._objective = spread(objective, place, config)
        self.part = Part(place.rank, place.world, sum_over_workers(place))
        """This worker's share of each batch."""

    @classmethod
    def of(cls, model: Module, config: Config, store: SequenceStore, place: Place) -> "Parallel":
        """What `config` trains `model` by; ConfigError, on all workers, when the model cannot be trained so."""
        train = config.train
        if train.activation_checkpointing:
            checkpoint_blocks(model)
        group = VocabularyGroup.of(place, train.vocabulary_parallel)
        loss = build_loss(config.loss) if group is None else sharded_loss(config.loss, group, store.num_items + 1)
        objective = Objective(model, loss, store.num_items, train.precision, Popularity.of(store.catalogue))
        return cls(objective, place, train, group)

    def train(self) -> None:
        """Turns dropout on."""
        self._objective.train()

    def warm_up(self, step: Step) -> None:
        """Lets DDP order its buckets, which it does after its first backward pass: a run that goes on would otherwise
        add up gradients in another order in its first step than the unbroken one in the same step.
        """
        if isinstance(self._objective, DistributedDataParallel):
            before = [(buffer, buffer.clone()) for buffer in self._plain.buffers()]  # such as counts of batches
            self.train()
            (self._objective(step, (0, 0, 0)) * 0).backward()
            self._objective.zero_grad(set_to_none=True)
            for buffer, kept in before:
                buffer.copy_(kept)

    def loss(self, step: Step, key: tuple[int, int, int]) -> Tensor:
        """The loss summed over this worker's targets; key: (seed, epoch, step)."""
        loss: Tensor = self._objective(step, key)
        return loss

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

    def meet(self) -> None:
        """After the last backward pass of a step: gradients of shards are there that DDP and FSDP know nothing of."""
        for shard in self._shards.values():
            if shard.weight.grad is not None:
                shard.group.sum_copies_(shard.weight.grad).div_(self.part.world)

    def clip(self, norm: float) -> Tensor:
        """Scales all gradients down where together they are longer than `norm`; gives back how long they were."""
        if self._group is None and not isinstance(self._objective, FSDPModule):
            return nn.utils.clip_grad_norm_(self._plain.parameters(), norm)
        shards = {shard.weight: shard.group.copies for shard in self._shards.values()}
        parts, squares = [], []
        for weight in self._plain.parameters():
            if weight.grad is not None:
                spread_out = isinstance(weight.grad, DTensor)
                parts.append(weight.grad.to_local() if isinstance(weight.grad, DTensor) else weight.grad)
                holders = 1 if spread_out else shards.get(weight, self.part.world)  # of the very same part
                squares.append(parts[-1].double().square().sum() / holders)
        square = torch.stack(squares).sum()
        dist.all_reduce(square)
        length = square.sqrt()
        scale = (norm / (length + 1e-6)).clamp(max=1.0)  # as nn.utils.clip_grad_norm_
        for part in parts:
            part.mul_(scale.to(part.dtype))
        return length

    @torch.no_grad()  # around the whole: FSDP puts hooks on what it gathers where slopes are wanted
    def evaluate(
        self, queries: Queries, config: EvaluateConfig, num_items: int, mark: Callable[[], None]
    ) -> dict[str, float]:
        """The metrics over all queries, ranked by all workers together; mark: called for each batch of them."""
        self._plain.eval()
        answer, longest, group = self._plain.answer, self._plain.model.max_length, self._group
        together = isinstance(self._objective, FSDPModule)
        if group is None:
            ranker: Ranker = partial(rank_scores, prediction_scorer(answer, longest, self.device))
            part = Part(self.part.rank, self.part.world, self.part.sum_over_workers, together)
        else:
            ranker = sharded_ranker(answer, longest, group, num_items + 1)
            part = Part(group.copy, group.copies, group.sum_over_copies, together)
        found = evaluate_ranker(marked(ranker, mark), queries, config, num_items, part)
        for module in self._plain.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what was gathered would not see weights that are loaded later
        return found


def marked(ranker: Ranker, mark: Callable[[], None]) -> Ranker:
    """The ranker, which calls `mark` for each batch of queries."""

    def marking(queries: Queries, k: int, exclude_seen: bool) -> Best:
        mark()
        return ranker(queries, k, exclude_seen)

    return marking


def spread(objective: Objective, place: Place, config: TrainConfig) -> nn.Module:
    """The objective, or what stands for it, on its device and in step with the other workers; shards stay alone."""
    if place.world == 1:
        return objective.to(place.device)
    shards = shards_of(objective)
    if config.parallel == "ddp":
        kept = {name for name, _ in objective.named_buffers()} - objective.state_dict().keys()
        # What is no part of the state is the same everywhere and never changes, so it need not be sent in each step.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, [*shards, *kept])  # type: ignore[no-untyped-call]
        return DistributedDataParallel(objective.to(place.device), gradient_as_bucket_view=True)
    mesh = init_device_mesh(place.device.type, (place.world,))
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh)
    # What is outside of the blocks, the item table above all, is needed from the first layer to the loss.
    alone: set[nn.Parameter] = {shard.weight for shard in shards.values()}
    fully_shard(objective, mesh=mesh, reshard_after_forward=False, ignored_params=alone)
    register_fsdp_forward_method(objective, "answer")
    return objective
