"""The trials of a search: what is recorded of them, and their table."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import ray.tune
from rich.console import Console
from rich.table import Table

from seqray.folder import Folder
from train.runs import Run

TRIALS_FILE = "trials.json"
Status = Literal["finished", "stopped early", "failed", "interrupted"]


@dataclass(frozen=True)
class TrialRow:
    """One trial as it ended."""

    number: int
    status: Status
    sample: dict[str, Any]
    best: float
    """Best value of the monitored metric; -1 when there was no validation."""
    epochs: int
    seconds: float
    bundle: str | None = None
    error: str | None = None


class Recorder(ray.tune.Callback):  # type: ignore[misc]
    """Prints each validation of each trial and writes trials.json when the search ends.

    It goes to disk because a search that is continued gets a copy of this object, not the object itself.
    """

    def __init__(self, search: Folder, bundles: Folder, monitor: str, first_tag: int) -> None:
        """bundles: where the trials put theirs. first_tag: what Ray counts the trials from, by the sampler."""
        self._search, self._bundles, self._monitor, self._first_tag = search, bundles, monitor, first_tag

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """A validation."""
        print(
            f"trial {self._number(trial)}  epoch {result['epoch']}  {self._monitor} {result[self._monitor]:.4f}",
            flush=True,
        )

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; Ray has printed why."""
        print(f"trial {self._number(trial)}  failed; the search goes on without it", flush=True)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """All trials are over, or the search was interrupted."""
        rows = sorted((self._row(self._number(trial), trial) for trial in trials), key=lambda row: row.number)
        self._search.write_text(
            TRIALS_FILE, json.dumps([asdict(row) for row in rows], indent=1, allow_nan=False) + "\n"
        )

    def _row(self, number: int, trial: Any) -> TrialRow:
        status: Status = "failed" if trial.status == "ERROR" else "interrupted"
        bundle = None
        if trial.status == "TERMINATED":
            run_id = f"{self._search.name}-{trial.trial_id}"
            finished = Run.load(self._search / "trials" / run_id).status == "finished"
            status = "finished" if finished else "stopped early"
            bundle = str(self._bundles / run_id) if finished else None
        best = trial.metric_analysis.get(self._monitor, {}).get("max", -1.0)
        last = trial.last_result or {}
        error = _last_line(trial.get_error()) if status == "failed" else None
        seconds = round(float(last.get("seconds", 0.0)), 1)
        return TrialRow(number, status, dict(trial.config), best, int(last.get("epoch", 0)), seconds, bundle, error)

    def _number(self, trial: Any) -> int:
        """From 1, in the order of the samples; Ray's own list changes its order when a search is continued."""
        return int(trial.experiment_tag.split("_")[0]) - self._first_tag + 1


def read_trials(search: Folder) -> list[TrialRow]:
    """The rows that the Recorder wrote, in the order of their numbers."""
    return [TrialRow(**row) for row in json.loads(search.read_text(TRIALS_FILE) or "[]")]


def print_trials(rows: Sequence[TrialRow], monitor: str) -> None:
    """A table, best trial first."""
    keys = list(dict.fromkeys(key for row in rows for key in row.sample))
    table = Table(title="trials", title_justify="left")
    for column in (
        "trial",
        "status",
        monitor,
        "epochs",
        "seconds",
        *(key.replace(".", ".\n") for key in keys),
        "error",
    ):
        table.add_column(column, overflow="fold")
    for row in sorted(rows, key=lambda row: -row.best):
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (row.sample.get(key, "") for key in keys)]
        best = f"{row.best:.4f}" if row.best >= 0 else ""
        table.add_row(
            str(row.number), row.status, best, str(row.epochs), f"{row.seconds:.1f}", *values, row.error or ""
        )
    Console(width=120).print(table)


def _last_line(error: Any) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else ""
