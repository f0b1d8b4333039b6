"""Clock: how fast a worker trains and where its time goes, without making an accelerator wait."""

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

SECONDS_BETWEEN_READINGS = 5.0

Phase = Literal["data", "compute", "communication", "checkpoint"]
PHASES: tuple[Phase, ...] = ("data", "compute", "communication", "checkpoint")


@dataclass(frozen=True)
class Speed:
    """What a clock read over some seconds of training; validations are not counted."""

    seconds: float
    steps: int
    tokens_per_s: float
    """Of all workers."""
    own_tokens_per_s: float
    """Of this worker."""
    shares: dict[Phase, float]
    """Phase -> its share of the seconds; they add up to 1.

    data: waiting for the next batch. communication: waiting for the gradients of all workers after the own ones were
    there; what overlaps with the backward pass, and what train.parallel does besides, counts as compute. checkpoint:
    the copy of the state, not the writing, which goes on beside training.
    """


class Clock:
    """Counts from `begin(phase)` to the next `begin` or `pause`.

    On a CPU the times are the host's. On a GPU they are those of events in its stream, which are read when the GPU has
    passed them: what the host does while the GPU is busy costs nothing and is not counted.
    """

    def __init__(self, device: torch.device, weights: Iterable[nn.Parameter] = ()) -> None:
        """weights: those whose gradients are summed over workers; none when there is one worker."""
        self._stamps = _CudaStamps() if device.type == "cuda" else _HostStamps()
        self._marks: deque[tuple[Phase | None, Any]] = deque()
        self._last_gradient: Any = None
        for weight in weights:
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._gradient_is_there)  # type: ignore[no-untyped-call]
        self._steps = self._tokens = self._own = 0
        self._restart()

    def begin(self, phase: Phase) -> None:
        """From now on time belongs to `phase`."""
        self._marks.append((phase, self._stamps.now()))

    def pause(self) -> None:
        """From now on time is not counted."""
        self._marks.append((None, self._stamps.now()))

    def gradients_are_summed(self) -> None:
        """The backward pass is over on all workers; since the last own gradient it was communication."""
        if self._last_gradient is not None:
            self._marks.append(("communication", self._last_gradient))
            self._last_gradient = None
            self.begin("compute")

    def step(self, tokens: int, own_tokens: int) -> Speed | None:
        """A step is done; a reading every few seconds."""
        self._steps, self._tokens, self._own = self._steps + 1, self._tokens + tokens, self._own + own_tokens
        self._fold()
        if time.perf_counter() - self._since < SECONDS_BETWEEN_READINGS:
            return None
        seconds = sum(self._spent.values())
        if not seconds:
            return None
        shares = {phase: self._spent[phase] / seconds for phase in PHASES}
        speed = Speed(seconds, self._steps, self._tokens / seconds, self._own / seconds, shares)
        self._restart()
        return speed

    def _restart(self) -> None:
        self._since, self._steps, self._tokens, self._own = time.perf_counter(), 0, 0, 0
        self._spent: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)

    def _fold(self) -> None:
        """Counts what lies between marks that have been passed."""
        while len(self._marks) > 1 and self._stamps.passed(self._marks[1][1]):
            phase, start = self._marks.popleft()
            if phase is not None:
                self._spent[phase] += self._stamps.seconds(start, self._marks[0][1])
            self._stamps.done_with(start)

    def _gradient_is_there(self, _: Tensor) -> None:
        if self._last_gradient is None:
            self._last_gradient = self._stamps.now()
        else:
            self._last_gradient = self._stamps.again(self._last_gradient)


class _HostStamps:
    """Points in time as seconds of the host's clock."""

    def now(self) -> float:
        return time.perf_counter()

    def again(self, _: float) -> float:
        return time.perf_counter()

    def passed(self, _: float) -> bool:
        return True

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def done_with(self, _: float) -> None:
        pass


class _CudaStamps:
    """Points in time as events of the GPU's stream, which are used again and again."""

    def __init__(self) -> None:
        self._free: list[Any] = []

    def now(self) -> Any:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return self.again(event)

    def again(self, event: Any) -> Any:
        event.record()
        return event

    def passed(self, event: Any) -> bool:
        return bool(event.query())

    def seconds(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) / 1000

    def done_with(self, event: Any) -> None:
        self._free.append(event)
