"""Real faults at a stated point of a run: SIGKILL in a process of its own, and workers without a cluster."""

import json
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from seqray.config import Config
from seqray.folder import Folder
from train.job import Job
from train.prepare import ensure_store
from train.runs import choose_run

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["train.fit", "train.worker", "train.objective"])


@dataclass(frozen=True)
class Blow:
    """SIGKILL when something has happened `count` times."""

    where: str
    """step: a training step begins; evaluation: a module runs in an evaluation; else the name of an audit event."""
    what: str = ""
    """Part of the audit event's first argument."""
    count: int = 1


def fit_and_die(config: dict[str, Any], blow: Blow) -> None:
    """In a new process: trains until the blow."""
    from train.fit import fit

    left = [blow.count]

    def strike() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    if blow.where in {"step", "evaluation"}:
        nn.modules.module.register_module_forward_pre_hook(_in_forward(blow.where == "step", strike))
    else:
        sys.addaudithook(
            lambda event, arguments: strike() if event == blow.where and blow.what in str(arguments[0]) else None
        )
    fit(Config.parse(config))


def killed(config: dict[str, Any], blow: Blow) -> None:
    """Runs `fit_and_die`; AssertionError when the blow did not come."""
    process = FORK.Process(target=fit_and_die, args=(config, blow))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"{blow} has not killed the run: {process.exitcode}"


def job_of(config: Config, folder: Path) -> Job:
    """A new run of the config, under `folder`."""
    store = ensure_store(config)
    output = Folder.at(folder)
    run, _ = choose_run(output / "runs" / config.name, config, store.manifest["content_sha256"], code={})
    return Job.of(config, run.next_attempt(), output, "group")


def progress_in(folder: Path) -> dict[str, Any]:
    """Of the newest checkpoint of the run in `folder`."""
    newest = max((folder / "checkpoints").glob("step_*"))
    found: dict[str, Any] = json.loads((newest / "progress.json").read_text())
    return found


def run_workers(job: dict[str, Any], world: int, folder: Path) -> list[str | None]:
    """Runs `work` in `world` processes on gloo, without Ray: what each raised, None for one that ended well."""
    meeting = Path(tempfile.mkdtemp(prefix="workers-", dir=folder))
    workers = [FORK.Process(target=_work, args=(job, rank, world, meeting)) for rank in range(world)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(240)
    codes = [worker.exitcode for worker in workers]
    results = [meeting / f"result-{rank}" for rank in range(world)]
    return [
        path.read_text() or None if path.exists() else f"exit {code}" for path, code in zip(results, codes, strict=True)
    ]


def _work(job: dict[str, Any], rank: int, world: int, meeting: Path) -> None:
    import torch
    import torch.distributed as dist

    from seqray.errors import SeqrayError
    from train.place import Place
    from train.run_log import RunLog
    from train.worker import work

    log = RunLog(Folder.at(job["run_folder"]), echo=False)
    dist.init_process_group("gloo", init_method=f"file://{meeting / 'store'}", rank=rank, world_size=world)
    message = ""
    try:
        work(Job(**job), Place(rank, world, torch.device("cpu")), lambda _: None, log.say)
    except SeqrayError as error:
        message = str(error)
    (meeting / f"result-{rank}").write_text(message)
    dist.destroy_process_group()


def _in_forward(training: bool, strike: Callable[[], None]) -> Callable[[nn.Module, Any], None]:
    from train.objective import Objective

    def hook(module: nn.Module, arguments: Any) -> None:
        if (isinstance(module, Objective) and module.training) if training else not module.training:
            strike()

    return hook
