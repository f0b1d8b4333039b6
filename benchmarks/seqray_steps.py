"""Our side of train_speed: the training loop of train/, which stops the clock after an optimizer step and waits."""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.step_protocol import Facts, Stopwatch, settle, side_parser
from seqray.config import Config
from seqray.losses import build_loss
from seqray.models.protocol import Module, build_model
from seqray.negatives import Popularity
from seqray.samples import Step
from seqray.sequences import SequenceStore
from train import worker
from train.narrator import Narrator
from train.objective import Objective
from train.optimizer import build_optimizer
from train.parallel import Parallel
from train.place import Place
from train.prepare import ensure_store
from train.state import Progress, TrainState
from train.trainer import Trainer, training_samples

NEVER = 10**9


class AskedSteps(Narrator):
    """Trains when the driver asks, and stands still otherwise."""

    def __init__(
        self, stopwatch: Stopwatch, facts: Facts, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(None, None)
        self._stopwatch, self._facts = stopwatch, facts
        objective.register_forward_hook(self._keep)
        optimizer.register_step_post_hook(self._step_done)

    def epoch(self, progress: Progress, steps: int, epochs: int) -> None:
        """Before the first step, when data, weights and trainer are ready, sends the facts."""
        if progress.global_step == 0:
            self._stopwatch.start(self._facts)

    def _keep(self, objective: nn.Module, inputs: tuple[Step, Any], loss: torch.Tensor) -> None:
        self._step, self._loss = inputs[0], loss.detach()

    def _step_done(self, *_: Any) -> None:
        step, loss = self._step, self._loss
        tokens, targets = len(step.batch.items_T), step.global_targets
        self._stopwatch.step_done(len(step.batch.lengths_B), lambda: tokens, lambda: float(loss) / targets)


def config_of(arguments: argparse.Namespace) -> Config:
    """A config of the asked sizes, the rest as it is by default; the feed-forward layer as wide as the peer's."""
    loss: dict[str, Any] = {"type": arguments.loss}
    if arguments.loss != "softmax":
        loss["num_negatives"] = arguments.num_negatives
    return Config.parse({
        "name": "train-speed",
        "data": {"path": str(arguments.events), "columns": {"timestamp": None}, "store": str(arguments.store)},
        "model": {
            "type": "sasrec", "hidden_dim": arguments.hidden_dim, "num_blocks": arguments.num_blocks,
            "num_heads": arguments.num_heads, "max_length": arguments.max_length, "dropout": arguments.dropout,
            "feedforward_dim": arguments.hidden_dim * (1 if arguments.blocks == "sasrec" else 4),
        },
        "loss": loss,
        "train": {
            "num_workers": 0, "device": arguments.device, "precision": arguments.precision, "windows": "last",
            "batch_size": arguments.batch_size, "learning_rate": 1e-3, "betas": [0.9, 0.98],
            "epochs": NEVER, "evaluate_every": NEVER, "checkpoint_steps": NEVER,
        },
    })  # fmt: skip


def train(config: Config, store: SequenceStore, device: torch.device) -> None:
    """Trains as train/worker.py does, without checkpoints and validations."""
    torch.manual_seed(config.seed)
    model = build_model(config.model, store.catalogue)
    objective = Objective(
        model, build_loss(config.loss), store.num_items, config.train.precision, Popularity.of(store.catalogue)
    )
    parallel = Parallel(objective, Place(0, 1, device), config.train)
    state = TrainState(model, build_optimizer(model, config.train))
    narrator = AskedSteps(Stopwatch(device.type), facts_of(config, store, model), objective, state.optimizer)
    Trainer(config, store, state, parallel, narrator, None).train(lambda _: None)


def facts_of(config: Config, store: SequenceStore, model: Module) -> Facts:
    """What is about to be trained."""
    samples = training_samples(config, store, model)
    parameters = sum(weight.numel() for weight in model.parameters())
    steps = samples.steps(config.train.batch_size)
    return Facts("seqray", parameters, store.num_items, len(samples), samples.tokens, steps)


def main() -> None:
    """Trains until the driver closes the line."""
    parser = side_parser(__doc__)
    parser.add_argument("--store", type=Path, required=True, help="folder of the prepared store, made when not there")
    arguments = parser.parse_args()
    settle(arguments.threads)
    device = torch.device(arguments.device)
    worker.settle(Place(0, 1, device), arguments.threads)
    config = config_of(arguments)
    train(config, ensure_store(config), device)


if __name__ == "__main__":
    main()
