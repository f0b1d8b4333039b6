"""The training loop of one worker: epochs, validations, checkpoints, early stopping. Knows no framework."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from seqray.config import Config
from seqray.errors import ConfigError, SeqrayError
from seqray.evaluation import with_split
from seqray.models.protocol import SequentialModel, is_causal
from seqray.negatives import step_negatives
from seqray.samples import Step, TrainingSamples
from seqray.sequences import IntArray, SequenceStore, Split
from train.baseline_rows import Rows, baseline_rows
from train.checkpoint_writer import CheckpointError, CheckpointWriter
from train.clock import Clock
from train.finite import Finite, TrainingError
from train.guard import Guard
from train.layout import load_model
from train.narrator import Narrator
from train.optimizer import learning_rate
from train.parallel import Parallel
from train.prefetch import prefetched
from train.pulse import Pulse
from train.state import TrainState

PULSES_BETWEEN_CHECKPOINTS = 5
"""While a node is about to be taken away."""


class Trainer:
    """Drives `state` to the end of training. Every random draw follows from (seed, epoch, step, worker)."""

    def __init__(
        self, config: Config, store: SequenceStore, state: TrainState, parallel: Parallel,
        narrator: Narrator, writer: CheckpointWriter | None, guard: Guard | None = None,
        baselines: Mapping[str, Rows] | None = None,
    ) -> None:  # fmt: skip
        """writer: the first worker's, None on the others. baselines: by split, those that are known."""
        self._config, self._store, self._state, self._parallel = config, store, state, parallel
        self._part, self._narrator, self._writer = parallel.part, narrator, writer
        self._guard, self._notices = guard or Guard(), 0
        self._device = parallel.device
        self._samples = training_samples(config, store, state.model)
        self._steps = self._samples.steps(config.train.batch_size)
        # A checkpoint holds the loss of all workers; the first one takes it over.
        loss = 0.0 if self._part.rank else state.progress.loss_sum
        self._loss_sum = torch.tensor(loss, dtype=torch.float64, device=self._device)
        self._targets = torch.tensor(state.progress.targets, device=self._device)
        self._finite = Finite(config.train.on_nan, self._part, self._device, narrator.tell)
        self._pulse = Pulse(self._part)
        self._clock = Clock(self._device, state.model.parameters() if self._part.world > 1 else ())
        self._epoch_loss = math.nan
        # With the validation targets among the training events a validation says nothing.
        self._chooses = config.train.until == "validation"
        self._baselines = dict(baselines or {})
        if not len(self._samples):
            raise TrainingError(f"{store.folder}: no user has two training events, so there is nothing to learn")

    def train(self, report: Callable[[Mapping[str, float]], None]) -> None:
        """Trains until the last epoch or until `patience` validations passed without a better one."""
        progress = self._state.progress
        if progress.done:
            # Of a former attempt, whose listener may not have noted it.
            report({**progress.history[-1], "training_over": 1.0})
        else:
            self._parallel.warm_up(self._parts(0, self._samples.order(0), 0)[-1])
        while not progress.done:
            self._train_epoch()
            last = progress.epoch == self._config.train.epochs
            if last or (self._chooses and progress.epoch % self._config.train.evaluate_every == 0):
                metrics = self._validate()
                progress.done = last or progress.bad_validations >= self._config.train.patience
                if progress.done or progress.bad_validations == 0:
                    self._save_checkpoint()
                if progress.done:
                    self._finish_checkpoints()
                report({**metrics, "training_over": float(progress.done)})

    def final_metrics(self) -> dict[str, Any]:
        """Test metrics of the best weights, its validation, and the baselines; the test targets are ranked once."""
        progress = self._state.progress
        load_model(self._state.model, self._state.best)
        best = next(row for row in progress.history if row["epoch"] == progress.best_epoch)
        chosen = {key: value for key, value in best.items() if key.startswith("val/")}
        tested = self._evaluate("test")
        val, test = self._baseline_rows("val"), self._baseline_rows("test")
        return {
            **tested, **chosen, "baselines": {name: val[name] | test[name] for name in test},
            "best_epoch": progress.best_epoch, "epochs": progress.epoch, "steps": progress.global_step,
            "skipped_steps": progress.skipped_steps, "train_seconds": round(progress.seconds, 1),
        }  # fmt: skip

    def _train_epoch(self) -> None:
        progress = self._state.progress
        self._parallel.train()
        make = partial(self._parts, progress.epoch, self._samples.order(progress.epoch))
        self._narrator.epoch(progress, self._steps, self._config.train.epochs)
        self._clock.begin("data")
        self._guard.mark(f"data of step {progress.global_step + 1}")
        started = time.perf_counter()
        for parts in prefetched(make, range(progress.step, self._steps), ahead=self._device.type != "cpu"):
            self._clock.begin("compute")
            self._guard.mark(f"step {progress.global_step + 1}")
            self._optimize(parts)
            progress.step += 1
            progress.global_step += 1
            self._guard.made(progress.global_step)
            progress.seconds += time.perf_counter() - started
            pulse = self._pulse.due()
            if pulse or self._device.type == "cpu":
                self._look_for_skipped()
            speed = self._clock.step(parts[0].global_tokens, sum(len(part.batch.items_T) for part in parts))
            if speed is not None:
                self._narrator.speed(progress, speed, self._learning_rate())
            self._clock.begin("checkpoint")
            if self._writer is not None:
                self._writer.poll()
            if self._is_checkpoint_due(pulse):
                self._save_checkpoint()
            self._clock.begin("data")
            self._guard.mark(f"data of step {progress.global_step + 1}")
            started = time.perf_counter()
        self._clock.pause()
        self._look_for_skipped()
        targets = int(self._targets)
        if not targets:
            raise TrainingError(f"epoch {progress.epoch + 1}: every step was skipped, so nothing was learnt")
        self._epoch_loss = float(self._global_loss()) / targets
        self._loss_sum.zero_()
        self._targets.zero_()
        progress.epoch, progress.step = progress.epoch + 1, 0

    def _parts(self, epoch: int, order: IntArray, number: int) -> list[Step]:
        """What this worker trains on in a step, in micro-batches."""
        (rank, world), count = (self._part.rank, self._part.world), self._config.train.accumulate_steps
        return [self._micro_batch(epoch, order, number, rank + world * part, world * count) for part in range(count)]

    def _micro_batch(self, epoch: int, order: IntArray, number: int, part: int, parts: int) -> Step:
        """A part of a step: the next events, or the model's own view of them."""
        step = self._samples.step(order, number, self._config.train.batch_size, part, parts)
        view = getattr(self._state.model, "training_view", None)
        if view is not None:
            step = view(step, step_negatives((self._config.seed, epoch, number), self._store.num_items, step))
        return step.to(self._device)

    def _optimize(self, parts: list[Step]) -> None:
        train, progress = self._config.train, self._state.progress
        key = (self._config.seed, progress.epoch, progress.step)
        torch.manual_seed(hash((*key, self._part.rank)))
        loss = torch.zeros((), device=self._device)
        for number, step in enumerate(parts, start=1):
            with self._parallel.apart() if number < len(parts) else nullcontext():
                part = self._parallel.loss(step, key)
                self._parallel.backward(part * self._finite.factor(part), step)
            loss = loss + part.detach()
        self._parallel.meet()
        self._clock.gradients_are_summed()
        norm = self._parallel.clip(train.clip_norm or math.inf)
        for group in self._state.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        made = self._finite.step(self._state.optimizer, loss, norm, progress.global_step + 1)
        self._state.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += torch.where(made, loss, 0.0)
        self._targets += made * parts[0].global_targets

    def _is_checkpoint_due(self, pulse: bool) -> bool:
        """By the count of steps, and again and again while a node is about to be taken away."""
        step = self._state.progress.global_step
        noticed = pulse and self._guard.preempted()
        self._notices = self._notices + 1 if noticed else self._notices * (not pulse)
        if noticed and self._notices % PULSES_BETWEEN_CHECKPOINTS == 1:
            self._narrator.tell(f"a node is about to be taken away: checkpoint at step {step}")
            return True
        return step % self._config.train.checkpoint_steps == 0

    def _look_for_skipped(self) -> None:
        """TrainingError, on all workers, when a step since the last look was no number and train.on_nan is stop."""
        self._state.progress.skipped_steps += self._finite.look(self._steps)

    def _learning_rate(self) -> float:
        train = self._config.train
        total = self._steps * train.epochs
        step = self._state.progress.global_step
        return learning_rate(step, total, train.learning_rate, train.warmup_steps, train.schedule)

    def _validate(self) -> dict[str, float]:
        """The row of this validation, after noting whether it is the best so far."""
        progress, monitor = self._state.progress, self._config.train.monitor
        metrics = {"train/loss": self._epoch_loss, **self._evaluate("val")}
        if metrics[monitor] > progress.best_value:
            progress.best_value, progress.best_epoch, progress.bad_validations = metrics[monitor], progress.epoch, 0
            self._state.keep_best()
        else:
            progress.bad_validations += 1
        row = {"epoch": progress.epoch, "step": progress.global_step, "seconds": round(progress.seconds, 2), **metrics}
        progress.history.append(row)
        self._narrator.validation(progress, row, monitor, self._baseline_rows("val"))
        return row

    def _evaluate(self, split: Split) -> dict[str, float]:
        mark = partial(self._guard.mark, f"evaluation after step {self._state.progress.global_step}")
        queries = self._store.queries(split)
        return with_split(self._parallel.evaluate(queries, self._config.evaluate, self._store.num_items, mark), split)

    def _baseline_rows(self, split: Split) -> Rows:
        """From the first worker alone: nobody else prints or stores them. Looked up once a run."""
        if split not in self._baselines:
            rows = {} if self._part.rank else baseline_rows(self._store, split, self._config.evaluate)
            self._baselines[split] = rows
        return self._baselines[split]

    def _global_loss(self) -> Tensor:
        return self._part.sum_over_workers(self._loss_sum)

    def _save_checkpoint(self) -> None:
        """Written by the first worker; the others add their parts of the epoch's loss and of the state."""
        self._look_for_skipped()
        self._guard.mark(f"checkpoint of step {self._state.progress.global_step}")
        loss = self._global_loss()
        self._state.progress.loss_sum, self._state.progress.targets = float(loss), int(self._targets)
        snapshot = self._state.snapshot()
        if self._writer is None:
            self._loss_sum.zero_()
            return
        self._loss_sum = loss.clone()
        self._writer.write(snapshot)

    def _finish_checkpoints(self) -> None:
        """The last one is on disk, or all workers end with the reason."""
        problem: SeqrayError | None = None
        try:
            if self._writer is not None:
                self._writer.finish()
        except CheckpointError as error:
            problem = error
        failed = self._part.sum_over_workers(torch.tensor([int(problem is not None)]))
        if problem is not None:
            raise problem
        if int(failed):
            raise TrainingError("the first worker cannot write the last checkpoint")


def training_samples(config: Config, store: SequenceStore, model: SequentialModel) -> TrainingSamples:
    """The samples that `config.train` asks for; ConfigError when the model cannot be trained on them."""
    train = config.train
    target = train.target or config.data.split.target
    has_view = hasattr(model, "training_view")
    whole = not is_causal(model) and not has_view
    if whole and train.samples == "rows":
        raise ConfigError(f"train.samples: model.type {config.model.type} is not causal, so it learns from prefixes")
    if has_view and (train.samples == "prefixes" or target == "next_basket"):
        raise ConfigError(f"train: model.type {config.model.type} learns from samples: rows and target: next_item")
    weighed = train.weigh != "items" or train.half_life_days is not None
    if store.shard_bounds is not None and (whole or train.samples == "prefixes" or target != "next_item" or weighed):
        raise ConfigError(
            "data.store_shards: trains on samples: rows and target: next_item, with weigh: items and without "
            "half_life_days; all else needs the whole log in memory"
        )
    if train.half_life_days is not None and not store.has_timestamps:
        raise ConfigError("train.half_life_days: needs times in the log (data.columns.timestamp)")
    return TrainingSamples(
        store, model.max_length, config.seed, windows=train.windows,
        prefixes=whole or train.samples == "prefixes", target=target,
        weigh=train.weigh, half_life_days=train.half_life_days, until=train.until,
    )  # fmt: skip
