"""Runs in their folders, local or behind a URI: which one a command continues, and which command may write to it."""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime
from typing import Any, Literal, Self

from seqray.config import Config
from seqray.errors import ConfigError, SeqrayError
from seqray.folder import Folder
from train.code import Code, code_differences

FREE_TO_CHANGE = (
    "name", "output", "serve", "tracking", "cluster", "evaluate.bundle", "evaluate.split", "evaluate.batch_size",
    "data.path", "data.store", "train.num_workers", "train.device", "train.cpus_per_worker", "train.checkpoint_steps",
    "train.keep_checkpoints", "train.max_failures", "tune.max_concurrent", "train.accumulate_steps",
    "train.activation_checkpointing", "train.parallel", "train.vocabulary_parallel", "train.on_nan",
    "train.max_preemptions", "train.hang_timeout_s", "train.start_timeout_s", "train.resize_interval_s",
)  # fmt: skip
"""What may differ when an unfinished run or search goes on: nothing of it decides what is learnt.

The content of the store stands for data.path.
"""

Content = Mapping[str, str]
"""File of the prepared store -> its sha256."""
RECORD_FILE = "run.json"
Status = Literal["unfinished", "finished", "abandoned"]


@dataclass(frozen=True)
class Run:
    """A run (or a search) and its folder; `run.json` in it is the record."""

    folder: Folder
    id: str
    name: str
    config: dict[str, Any]
    """The resolved config as plain data."""
    content: Content
    """Content hashes of the prepared store."""
    status: Status = "unfinished"
    attempt: int = 0
    """Counts the commands that worked on the run; an older attempt's workers no longer write."""
    owner: str = ""
    """Drawn anew for each attempt, so that two commands that take one number at once are told apart."""
    created: str = ""
    parent: str | None = None
    """Run id of the bundle that the run started from."""
    code: dict[str, str] = field(default_factory=dict)
    """What stands for the code (`train.code.code_of`)."""
    changes: list[str] = field(default_factory=list)
    """What was changed while it was unfinished, and accepted."""

    @classmethod
    def load(cls, folder: Folder | str | os.PathLike[str]) -> Self:
        """The run in `folder`; ConfigError when its record cannot be read."""
        folder = folder if isinstance(folder, Folder) else Folder.at(folder)
        try:
            return cls(folder, **json.loads(folder.read_text(RECORD_FILE) or ""))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{folder / RECORD_FILE}: not the record of a run: {error}") from error

    def save(self) -> Self:
        """Writes the record and gives the run back."""
        record = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "folder"}
        self.folder.write_text(RECORD_FILE, json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        return self

    def mark(self, status: Status) -> Self:
        """The run with a new status, saved."""
        return replace(self, status=status).save()

    def next_attempt(self) -> Self:
        """The run as a new command works on it; call it under `lock`."""
        current = self.load(self.folder)
        if current.status != self.status:
            raise ConfigError(f"{self.folder}: another command has {current.status} this run meanwhile; start again")
        owner = secrets.token_hex(4)
        return replace(current, attempt=current.attempt + 1, owner=owner, status="unfinished").save()

    def with_parent(self, parent: str) -> Self:
        """The run with the run id of the bundle it starts from, saved: the bundle itself may go later."""
        return replace(self, parent=parent).save()

    def has_learnt(self) -> bool:
        """Whether there is a checkpoint, or the trials of a search, that a new start would lose."""
        checkpoints = (self.folder / "checkpoints").names()
        return any(name.startswith("step_") for name in checkpoints) or "tune" in self.folder.names()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the command that works on the run; a second command gets a ConfigError.

        Behind a URI nothing can be locked: there a second command takes the run over, and the first one ends before
        its next checkpoint (`check_attempt`).
        """
        if not self.folder.is_local:
            yield
            return
        with (self.folder.path / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{self.folder}: another command is working on this run") from error
            yield


class StaleAttempt(SeqrayError):
    """A newer command has taken the run over."""


def check_attempt(folder: str, attempt: int, owner: str) -> None:
    """Raises StaleAttempt when a newer command continues the run, so that no two go on writing checkpoints.

    Of commands that take a run over at the same time the last one to write the record goes on. A write that began
    before the record changed may still end after it: it is complete, and of the same run at an earlier step.
    """
    current = Run.load(folder)
    if (current.attempt, current.owner) != (attempt, owner):
        raise StaleAttempt(f"{folder}: attempt {current.attempt} has taken over from attempt {attempt}")


def choose_run(
    root: Folder,
    config: Config,
    content: Content,
    *,
    code: Code,
    fresh: bool = False,
    accept_changes: bool = False,
    run_id: str | None = None,
    ignore: tuple[str, ...] = (),
) -> tuple[Run, bool]:
    """(the run to work on, whether it is continued) among the runs of `config.name` under `root`.

    The newest unfinished run goes on when config, data and code are the same. When they are not, it is refused with the
    difference, goes on all the same with `accept_changes`, and is abandoned when it has learnt nothing yet. A finished
    run is never touched: a new one is made. `fresh` abandons the unfinished one. run_id: this very run (a trial),
    finished or not. ignore: further paths that may differ.
    """
    names = [run_id] if run_id else root.names()
    runs = [Run.load(root / name) for name in names if RECORD_FILE in (root / name).names()]
    going = [run for run in runs if run.status == "unfinished" or run.id == run_id]
    if going:
        run, lines = going[-1], _differences(going[-1], config, content, code, ignore)
        if not lines and not fresh:
            return run, True
        if not fresh and run.has_learnt():
            if accept_changes:
                return _accepted(run, config, content, code, lines), True
            raise ConfigError(
                f"run {run.id} of {run.name!r} is unfinished and was started with something else:\n  "
                + "\n  ".join(lines)
                + "\nput it back to continue the run, continue it all the same with --accept-changes, start anew with "
                "--fresh, or give the new run another name="
            )
        with run.lock():
            run.mark("abandoned")
    now = datetime.now(UTC)
    new_id = run_id or f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return Run(
        root / new_id,
        new_id,
        config.name,
        config.plain(),
        content,
        created=now.isoformat(timespec="seconds"),
        code=dict(code),
    ).save(), False


def _accepted(run: Run, config: Config, content: Content, code: Code, lines: list[str]) -> Run:
    """The run as it goes on with other config, data or code; its record keeps the difference."""
    print(f"run {run.id} goes on with what has changed:\n  " + "\n  ".join(lines), flush=True)
    with run.lock():
        changed = replace(run, config=config.plain(), content=content, code=dict(code))
        return replace(changed, changes=[*run.changes, *lines]).save()


def _differences(run: Run, config: Config, content: Content, code: Code, ignore: tuple[str, ...]) -> list[str]:
    lines = differences(run.config, config.plain(), ignore)
    if content != run.content:
        changed = [name for name in {**run.content, **content} if run.content.get(name) != content.get(name)]
        lines.append(f"data: the content of the prepared store has changed ({', '.join(changed)})")
    return [*lines, *code_differences(run.code, code)]


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], ignore: tuple[str, ...] = (), prefix: str = ""
) -> list[str]:
    """`path: old -> new` for every value that decides what is learnt."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        path, before, after = f"{prefix}{key}", old.get(key), new.get(key)
        if path in FREE_TO_CHANGE or path in ignore or before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, ignore, f"{path}.")
        else:
            lines.append(f"{path}: {before!r} -> {after!r}")
    return lines
