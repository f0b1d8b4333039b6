"""Real faults at a stated point of a run: SIGKILL in a process of its own."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

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
    from seqray.config import Config
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


def _in_forward(training: bool, strike: Callable[[], None]) -> Callable[[nn.Module, Any], None]:
    from train.objective import Objective

    def hook(module: nn.Module, arguments: Any) -> None:
        if (isinstance(module, Objective) and module.training) if training else not module.training:
            strike()

    return hook
