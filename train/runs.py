"""Runs on disk: which one a command continues, and which command may write to it."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from seqray.command import write_json
from seqray.config import Config
from seqray.errors import ConfigError, SeqrayError

FREE_TO_CHANGE = (
    "name", "output", "serve", "tracking", "cluster", "evaluate.bundle", "evaluate.split", "data.store",
    "train.num_workers", "train.device", "train.cpus_per_worker", "train.checkpoint_steps", "train.keep_checkpoints",
    "train.max_failures", "tune.max_concurrent",
)  # fmt: skip
"""What may differ when an unfinished run or search goes on: nothing of it decides what is learnt."""

Status = Literal["unfinished", "finished", "abandoned"]


@dataclass(frozen=True)
class Run:
    """A run (or a search) and its folder; `run.json` in it is the record."""

    folder: Path
    id: str
    name: str
    config: dict[str, Any]
    """The resolved config as plain data."""
    content: str
    """Content hash of the prepared store."""
    status: Status = "unfinished"
    attempt: int = 0
    """Counts the commands that worked on the run; an older attempt's workers no longer write."""
    created: str = ""

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The run in `folder`."""
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        return cls(folder, **record)

    def save(self) -> Self:
        """Writes the record and gives the run back."""
        record = asdict(self)
        del record["folder"]
        write_json(self.folder / "run.json", record)
        return self

    def mark(self, status: Status) -> Self:
        """The run with a new status, saved."""
        return replace(self, status=status).save()

    def next_attempt(self) -> Self:
        """The run as a new command works on it; call it under `lock`."""
        return replace(self, attempt=self.attempt + 1).save()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the command that works on the run; a second command gets a ConfigError."""
        with (self.folder / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{self.folder}: another command is working on this run") from error
            yield


class StaleAttempt(SeqrayError):
    """A newer command has taken the run over."""


def check_attempt(folder: Path, attempt: int) -> None:
    """Raises StaleAttempt when a newer command continues the run, so that two never write one checkpoint folder."""
    current = Run.load(folder).attempt
    if current != attempt:
        raise StaleAttempt(f"{folder}: attempt {current} has taken over from attempt {attempt}")


def choose_run(
    root: Path, config: Config, content: str, *, fresh: bool = False, run_id: str | None = None
) -> tuple[Run, bool]:
    """(the run to work on, whether it is continued) among the runs of `config.name` under `root`.

    The newest unfinished run goes on when config and data are the same, and is refused with the difference when they
    are not. A finished run is never touched: a new one is made. `fresh` abandons the unfinished one.
    """
    runs = [Run.load(path.parent) for path in sorted(root.glob(f"{run_id or '*'}/run.json"))]
    unfinished = [run for run in runs if run.status == "unfinished"]
    if unfinished and fresh:
        unfinished[-1].mark("abandoned")
    elif unfinished:
        run = unfinished[-1]
        _refuse_difference(run, config, content)
        return run, True
    now = datetime.now(UTC)
    new_id = run_id or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = root / new_id
    folder.mkdir(parents=True, exist_ok=True)
    return Run(
        folder, new_id, config.name, config.plain(), content, created=now.isoformat(timespec="seconds")
    ).save(), False


def _refuse_difference(run: Run, config: Config, content: str) -> None:
    lines = differences(run.config, config.plain())
    if content != run.content:
        lines.append("data: the content of the prepared store has changed")
    if lines:
        raise ConfigError(
            f"run {run.id} of {run.name!r} is unfinished and was started with another config:\n  "
            + "\n  ".join(lines)
            + "\nput the values back to continue it, start anew with --fresh, or give the new run another name="
        )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """`path: old -> new` for every value that decides what is learnt."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if path in FREE_TO_CHANGE or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, f"{path}.")
        else:
            lines.append(f"{path}: {before!r} -> {after!r}")
    return lines


def absolute(path: str | os.PathLike[str]) -> Path:
    """The path from the root: workers do not share the command's working folder."""
    return Path(path).expanduser().absolute()
