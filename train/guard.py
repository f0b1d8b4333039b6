"""Guard: what a worker's training loop tells those who watch over it, and asks them."""

from collections.abc import Callable
from dataclasses import dataclass


def ignore(_: object) -> None:
    """Nobody watches."""


@dataclass(frozen=True)
class Guard:
    """Nobody watches unless told otherwise."""

    mark: Callable[[str], None] = ignore
    """Something new begins: a sign of life."""
    made: Callable[[int], None] = ignore
    """A step of the run was made."""
    preempted: Callable[[], bool] = lambda: False
    """Whether a node is about to be taken away; all workers ask it in the same step and hear the same."""
