"""The measures of a replica in Ray's own metrics export, where Prometheus finds those of all replicas of a cluster.

Ray has no histogram that takes counts, and a call for each value would cost more than the rest of the measuring. So a
histogram goes out as the counters that Prometheus makes of it anyway: `_bucket` with the label `le`, `_sum`, `_count`.
Ray adds `ray_` in front, `_total` behind counters, and the labels deployment, replica and application.
"""

import threading
import time
from collections.abc import Iterator
from typing import Any

from serve.measures import COUNTERS, GAUGES, HISTOGRAMS, Family, Labels, Measures

INTERVAL_S = 5.0


class RayMeasures:
    """Passes on what was added since the last time. Only inside a replica of Ray Serve."""

    def __init__(self, measures: Measures) -> None:
        from ray.serve.metrics import Counter, Gauge

        self._measures = measures
        self._counters: dict[str, tuple[Any, Labels]] = {
            name: (Counter(name, about, labels), labels) for name, about, labels in counter_names()
        }
        self._gauges = {family: Gauge(family.name, family.about, family.labels) for family in GAUGES}
        self._passed: dict[tuple[str, Labels], float] = {}
        self._shown: dict[Family, set[Labels]] = {family: set() for family in GAUGES}

    def start(self) -> None:
        """Passes on every few seconds, in a thread that ends with the process."""
        threading.Thread(target=self._run, name="ray-measures", daemon=True).start()

    def pass_on(self) -> None:
        """Passes on now."""
        for name, labels, number in _counters(self._measures):
            added = number - self._passed.get((name, labels), 0)
            if added > 0:
                counter, names = self._counters[name]
                counter.inc(added, dict(zip(names, labels, strict=True)))
                self._passed[name, labels] = number
        shown: dict[Family, set[Labels]] = {family: set() for family in GAUGES}
        for family, labels, number in self._measures.gauges():
            self._gauges[family].set(number, dict(zip(family.labels, labels, strict=True)))
            shown[family].add(labels)
        for family, before in self._shown.items():
            for labels in before - shown[family]:  # a model that went away would stand there for ever
                self._gauges[family].set(0, dict(zip(family.labels, labels, strict=True)))
        self._shown = shown

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            self.pass_on()


def counter_names() -> Iterator[tuple[str, str, Labels]]:
    """(name, about, labels) of all that goes to Ray as a counter."""
    for family in COUNTERS:
        yield family.name, family.about, family.labels
    for family in HISTOGRAMS:
        yield f"{family.name}_bucket", family.about, (*family.labels, "le")
        yield f"{family.name}_sum", family.about, family.labels
        yield f"{family.name}_count", family.about, family.labels


def _counters(measures: Measures) -> Iterator[tuple[str, Labels, float]]:
    for family, labels, number in measures.counters():
        yield family.name, labels, number
    for family, labels, buckets in measures.histograms():
        total = 0
        for bound, total in buckets.cumulative():
            yield f"{family.name}_bucket", (*labels, bound), total
        yield f"{family.name}_sum", labels, buckets.total
        yield f"{family.name}_count", labels, total


def show_in_ray(measures: Measures) -> None:
    """Gives the measures the name of this replica, and passes them on to Ray from now on."""
    import ray.serve

    measures.replica = ray.serve.get_replica_context().replica_id.unique_id
    RayMeasures(measures).start()
