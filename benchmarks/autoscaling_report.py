"""What came of a load that rose and fell on a `python -m serve`: told in lines, and drawn (see autoscaling.py)."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Step:
    """A part of the load."""

    rate: float
    seconds: float

    @classmethod
    def read(cls, text: str) -> "Step":
        rate, _, seconds = text.partition(":")
        return cls(float(rate), float(seconds))


@dataclass(frozen=True)
class Asked:
    """One request; times in seconds since the load began."""

    due: float
    answered: float
    status: str


@dataclass(frozen=True)
class Look:
    """The replicas at a moment."""

    at: float
    running: int
    starting: int

    @property
    def wanted(self) -> int:
        """The controller's target: what is missing starts in the round of its loop that raises it."""
        return self.running + self.starting


def print_steps(steps: Sequence[Step], asked: Sequence[Asked], looks: Sequence[Look]) -> None:
    """A line for each step."""
    print(f"{'offered/s':>9} {'seconds':>8} {'sent':>6} {'not 200':>8} {'p50 ms':>8} {'p95 ms':>8} {'replicas':>9}")
    start = 0.0
    for step in steps:
        end = start + step.seconds
        here = [one for one in asked if start <= one.due < end]
        running = [look.running for look in looks if start <= look.at < end] or [0]
        p50, p95 = np.percentile([(one.answered - one.due) * 1000 for one in here] or [0], [50, 95])
        lost = sum(one.status != "200" for one in here)
        print(
            f"{step.rate:>9g} {step.seconds:>8g} {len(here):>6} {lost:>8} {p50:>8.0f} {p95:>8.0f} "
            f"{f'{running[0]} to {running[-1]}':>9}"
        )
        start = end
    statuses = Counter(one.status for one in asked if one.status != "200")
    print("not 200:", ", ".join(f"{count} {status}" for status, count in statuses.items()) or "none")
    for rise in rises(steps, looks):
        print(f"{rise.rate:g}/s: one more wanted after {_told(rise.wanted)}, running after {_told(rise.running)}")
    fallen = first_fall(steps, looks)
    if fallen is not None:
        print(f"one was taken away {fallen:.1f} s after that step began")


@dataclass(frozen=True)
class Rise:
    """The answer to a step up: seconds of the step until a replica more was wanted and running, None if never."""

    rate: float
    wanted: float | None
    running: float | None


def rises(steps: Sequence[Step], looks: Sequence[Look]) -> list[Rise]:
    """Every step up that found fewer replicas than there ever were."""
    found, most, start = [], max(look.wanted for look in looks), steps[0].seconds
    for before, step in pairwise(steps):
        end = start + step.seconds
        last = max((look for look in looks if look.at < start), key=lambda look: look.at)
        if step.rate > before.rate and last.wanted < most:
            here = [look for look in looks if start <= look.at < end]
            wanted = next((look.at - start for look in here if look.wanted > last.wanted), None)
            running = next((look.at - start for look in here if look.running > last.running), None)
            found.append(Rise(step.rate, wanted, running))
        start = end
    return found


def first_fall(steps: Sequence[Step], looks: Sequence[Look]) -> float | None:
    """After how many seconds of its step the first of the most replicas was wanted no more."""
    most = max(look.wanted for look in looks)
    peak = next(look.at for look in looks if look.wanted == most)
    fallen = next((look.at for look in looks if look.at > peak and look.wanted < most), None)
    starts = np.cumsum([0.0, *(step.seconds for step in steps)])
    return None if fallen is None else fallen - max(start for start in starts if start <= fallen)


def _told(seconds: float | None) -> str:
    return "no time of the step" if seconds is None else f"{seconds:.1f} s"


def draw(path: Path, steps: Sequence[Step], asked: Sequence[Asked], looks: Sequence[Look]) -> None:
    """The plot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    ends = np.cumsum([0.0, *(step.seconds for step in steps)])
    seconds = np.arange(int(max(ends[-1], *(one.answered for one in asked))) + 1)
    answered = [one for one in asked if one.status == "200"]
    per_second = np.bincount([int(one.answered) for one in answered], minlength=len(seconds))[: len(seconds)]
    latency = np.full(len(seconds), np.nan)
    for second in seconds:
        here = [(one.answered - one.due) * 1000 for one in answered if int(one.due) == second]
        latency[second] = np.percentile(here, 95) if here else np.nan
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    rates, times, replicas = figure.subplots(3, 1, sharex=True)
    rates.stairs([step.rate for step in steps], ends, label="offered", color="#9aa8b7", linewidth=2)
    rates.plot(seconds + 0.5, per_second, label="answered", color="#0f766e")
    lost = [one.due for one in asked if one.status != "200"]
    rates.plot(lost, [0] * len(lost), "x", color="#b3261e", label=f"not answered 200: {len(lost)} of {len(asked)}")
    rates.set_ylabel("requests/s")
    rates.legend(loc="upper left")
    times.plot(seconds + 0.5, latency, ".-", color="#0f766e")
    times.set_yscale("log")
    times.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    times.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    times.yaxis.set_minor_locator(NullLocator())
    times.set_ylabel("p95, ms")
    at = [look.at for look in looks]
    wanted = [look.wanted for look in looks]
    replicas.step(at, wanted, where="post", color="#9aa8b7", label="running and starting")
    replicas.step(at, [look.running for look in looks], where="post", color="#0f766e", linewidth=2, label="running")
    replicas.set_ylabel("replicas")
    replicas.set_ylim(bottom=0)
    replicas.yaxis.get_major_locator().set_params(integer=True)
    replicas.set_xlabel("seconds")
    replicas.legend(loc="lower center", ncols=2)
    for axes in (rates, times, replicas):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
