"""Tells how a run goes: lines in its log and metrics in W&B, from the first worker only."""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from seqray.sequences import SequenceStore
from seqray.tracking import Tracker
from train.clock import Speed
from train.gauges import Gauges
from train.job import Job
from train.objective import uses_bf16
from train.run_log import Say
from train.state import Progress


class Narrator:
    """Says lines to the run's log; silent (say is None) on all workers but the first."""

    def __init__(self, say: Say | None, tracker: Tracker | None, gauges: Gauges | None = None) -> None:
        """gauges: Ray's metrics, which every worker has."""
        self._to_log, self._tracker, self._gauges = say, tracker, gauges
        self._steps, self._epochs = 1, 1

    def start(self, job: Job, parameters: int, held: int, store: SequenceStore, device: str, world: int) -> None:
        """What is trained on what; held: parameters that this worker holds."""
        counts, until = store.manifest["counts"], job.config["train"]["until"]
        events = int(store.events_until(until).sum())
        precision = "bf16" if uses_bf16(job.config["train"]["precision"], device) else "fp32"
        here = f" ({held:,} in the first worker)" if held < parameters else ""
        self._say(
            f"run {job.run_id}: {job.config['model']['type']} with {job.config['loss']['type']}, "
            f"{parameters:,} parameters{here}, {counts['users']:,} users, "
            f"{counts['items']:,} items, {events:,} training events; "
            f"{world} worker{'s'[: world > 1]} on {device}, {precision}"
        )
        if until == "test":
            self._say("train.until is test: validation targets are trained on, so val/ metrics say nothing")

    def origin(
        self, job: Job, checkpoint: str | None, passed_over: Sequence[str], known: int | None, lost: int
    ) -> None:
        """From where it goes on; known: items that the bundle of train.init_from knew; lost: steps to be made again."""
        for reason in passed_over:
            self._say(f"checkpoint passed over: {reason}")
        again = f"; steps lost since then, to be made again: {lost}" if lost else ""
        if checkpoint is not None:
            self._say(f"goes on from checkpoint {checkpoint} in {job.run_folder}{again}")
        elif job.attempt > 1 or lost:
            self._say(f"goes on from the beginning: the run has no checkpoint yet{again}")
        if known is not None:
            self._say(f"starts from bundle {job.init_from}, which knows {known:,} of the items")

    def epoch(self, progress: Progress, steps: int, epochs: int) -> None:
        """An epoch begins (or goes on)."""
        if progress.step:
            self._say(f"epoch {progress.epoch + 1} goes on at step {progress.step}/{steps}")
        self._steps, self._epochs = steps, epochs

    def speed(self, progress: Progress, speed: Speed, rate: float) -> None:
        """A line every few seconds of training."""
        if self._gauges is not None:
            self._gauges.show(speed)
        left = ((self._epochs - progress.epoch) * self._steps - progress.step) * speed.seconds / speed.steps
        shares = "  ".join(f"{phase} {share:.0%}" for phase, share in speed.shares.items())
        self._say(
            f"epoch {progress.epoch + 1}/{self._epochs}  step {progress.step}/{self._steps}  "
            f"{speed.tokens_per_s:,.0f} tokens/s ({speed.own_tokens_per_s:,.0f} by this worker)  {shares}  "
            f"at most {timedelta(seconds=round(left))} left"
        )
        metrics = {f"time/{phase}": share for phase, share in speed.shares.items()}
        metrics |= {"train/tokens_per_s": speed.tokens_per_s, "train/own_tokens_per_s": speed.own_tokens_per_s}
        self._log({**metrics, "train/learning_rate": rate}, progress.global_step)

    def validation(
        self, progress: Progress, row: Mapping[str, float], monitor: str, baselines: Mapping[str, Mapping[str, float]]
    ) -> None:
        """The validation of an epoch, with the baselines beside it."""
        beside = "  ".join(f"{name} {metrics[monitor]:.4f}" for name, metrics in baselines.items())
        best = "best so far" if progress.bad_validations == 0 else f"best {progress.best_value:.4f}"
        self._say(
            f"epoch {progress.epoch}/{self._epochs}  train/loss {row['train/loss']:.4f}  "
            f"{monitor} {row[monitor]:.4f} ({best})  beside: {beside}"
        )
        metrics = {key: value for key, value in row.items() if "/" in key}
        self._log({**metrics, "epoch": progress.epoch}, progress.global_step)

    def tell(self, line: str) -> None:
        """Something that happened beside the usual."""
        self._say(line)

    def end(self, values: Mapping[str, Any]) -> None:
        """The run's result, for W&B, and what it cost beside the training itself."""
        if values["restarts"]:
            self._say(f"times taken up again: {values['restarts']}; steps made in vain: {values['wasted_steps']}")
        if values["skipped_steps"]:
            self._say(f"steps skipped, whose loss or gradients were no numbers: {values['skipped_steps']}")
        if self._tracker is not None:
            self._tracker.summary(values)

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run."""
        if self._tracker is not None:
            self._tracker.finish(exit_code)

    def _say(self, line: str) -> None:
        if self._to_log is not None:
            self._to_log(line)

    def _log(self, metrics: Mapping[str, float], step: int) -> None:
        if self._tracker is not None:
            self._tracker.log(metrics, step)
