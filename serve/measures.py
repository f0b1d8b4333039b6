"""Measures: what a replica counts, in plain numbers, and the names under which Prometheus finds it.

A request costs a few additions; what is exported is made when somebody asks (GET /metrics) or every few seconds
(`serve.ray_measures`), from the same numbers.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.record import Record

Labels = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Family:
    """A metric: its name without the endings that Prometheus adds, and the names of its labels."""

    name: str
    about: str
    labels: Labels = ()
    bounds: tuple[float, ...] = ()
    """Upper bounds of the buckets of a histogram."""


SECONDS = (
    0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0,
)  # fmt: skip
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)

REQUESTS = Family("seqray_requests", "Requests that were answered.", ("endpoint", "status"))
RECOMMENDATIONS = Family("seqray_recommendations", "Lists of items that were made.")
FALLBACKS = Family("seqray_fallbacks", "Lists made of popular items because the model knew no item of the history.")
UNKNOWN_ITEMS = Family("seqray_unknown_items", "Items of histories that the model does not know.")
EVENTS_ACCEPTED = Family("seqray_events_accepted", "Events that were stored and answered 202.")
KEYS_REFUSED = Family("seqray_keys_refused", "Requests refused for their key or its scope.", ("reason",))
RATE_LIMITED = Family("seqray_rate_limited", "Requests refused because their key asked too often.", ("key",))
COUNTERS = (REQUESTS, RECOMMENDATIONS, FALLBACKS, UNKNOWN_ITEMS, EVENTS_ACCEPTED, KEYS_REFUSED, RATE_LIMITED)

STAGE_SECONDS = Family("seqray_stage_seconds", "Seconds of a request, by stage.", ("endpoint", "stage"), SECONDS)
BATCH_SIZE = Family("seqray_batch_size", "Requests that the model ranked at once.", (), SIZES)
HISTOGRAMS = (STAGE_SECONDS, BATCH_SIZE)

WAITING = Family("seqray_waiting_requests", "Requests that wait for the model now.", ("variant",))
MODEL = Family("seqray_model", "1 for each model that answers.", ("model", "version", "variant"))
FAILED = Family("seqray_failed_versions", "Versions that the registry wants and that did not become ready.")
SHADOW = Family("seqray_shadow_comparisons", "Answers compared with the challenger's, by outcome.", ("outcome",))
SHADOW_OVERLAP = Family("seqray_shadow_overlap", "Mean share of items in both answers of a comparison.")
GAUGES = (WAITING, MODEL, FAILED, SHADOW, SHADOW_OVERLAP)


class Buckets:
    """A histogram: how many values fell up to each bound, and beyond the last, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        """Counts a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """(bound, values up to it), as Prometheus has them, the last bound `+Inf`."""
        count = 0
        for bound, added in zip((*map(str, self.bounds), "+Inf"), tuple(self.counts), strict=True):
            count += added
            yield bound, count


Reading = Callable[[], Mapping[Labels, float]]


class Measures:
    """The numbers of one replica. Written from the event loop alone, read from anywhere."""

    def __init__(self, replica: str = "") -> None:
        self.replica = replica
        """Which replica of the application this is."""
        self._counts: dict[Family, dict[Labels, float]] = {family: {} for family in COUNTERS}
        self._buckets: dict[Family, dict[Labels, Buckets]] = {family: {} for family in HISTOGRAMS}
        self._gauges: dict[Family, Reading] = {}

    def count(self, family: Family, labels: Labels = (), number: float = 1) -> None:
        """Adds to a counter; `labels` in the order of its family."""
        counts = self._counts[family]
        counts[labels] = counts.get(labels, 0) + number

    def observe(self, family: Family, labels: Labels, value: float) -> None:
        """Adds a value to a histogram."""
        found = self._buckets[family].get(labels)
        if found is None:
            found = self._buckets[family][labels] = Buckets(family.bounds)
        found.observe(value)

    def watch(self, family: Family, reading: Reading) -> None:
        """Asks `reading` for a gauge whenever it is exported."""
        assert family in GAUGES
        self._gauges[family] = reading

    def done(self, record: Record) -> None:
        """Takes over what is known of a request that was answered."""
        endpoint = record.endpoint
        self.count(REQUESTS, (endpoint, str(record.status)))
        for stage, seconds in record.seconds.items():
            self.observe(STAGE_SECONDS, (endpoint, stage), seconds)
        for size in record.batches:
            self.observe(BATCH_SIZE, (), size)
        for family, number in (
            (RECOMMENDATIONS, record.answers), (FALLBACKS, record.fallbacks), (UNKNOWN_ITEMS, record.unknown_items),
            (EVENTS_ACCEPTED, record.events),
        ):  # fmt: skip
            if number:
                self.count(family, (), number)

    def counters(self) -> Iterator[tuple[Family, Labels, float]]:
        """All counters as they are now."""
        for family, counts in self._counts.items():
            for labels, number in counts.copy().items():  # copied in one step: the event loop goes on adding
                yield family, labels, number

    def histograms(self) -> Iterator[tuple[Family, Labels, Buckets]]:
        """All histograms as they are now."""
        for family, found in self._buckets.items():
            for labels, buckets in found.copy().items():
                yield family, labels, buckets

    def gauges(self) -> Iterator[tuple[Family, Labels, float]]:
        """All gauges, read now."""
        for family, reading in self._gauges.items():
            for labels, number in reading().items():
                yield family, labels, number

    def text(self) -> bytes:
        """All of it in the text format of Prometheus, each with the label `replica`."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Page(self))
        return generate_latest(registry)


class _Page(Collector):
    def __init__(self, measures: Measures) -> None:
        self._measures = measures

    def collect(self) -> Iterable[Metric]:
        measures, replica = self._measures, self._measures.replica
        pages: dict[Family, Metric] = {}
        for family, kind in (
            *((family, CounterMetricFamily) for family in COUNTERS),
            *((family, HistogramMetricFamily) for family in HISTOGRAMS),
            *((family, GaugeMetricFamily) for family in GAUGES),
        ):
            pages[family] = kind(family.name, family.about, labels=("replica", *family.labels))
        for family, labels, number in (*measures.counters(), *measures.gauges()):
            pages[family].add_metric((replica, *labels), number)  # type: ignore[attr-defined]
        for family, labels, buckets in measures.histograms():
            values = list(buckets.cumulative())
            pages[family].add_metric((replica, *labels), values, buckets.total)  # type: ignore[attr-defined]
        return pages.values()
