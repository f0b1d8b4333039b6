"""A run's speed as Ray's own metrics, which a cluster's Prometheus collects from every node."""

from train.clock import Speed

LABELS = ("experiment", "run", "worker")


class Gauges:
    """`ray_seqray_tokens_per_s` of this worker, and `ray_seqray_time_share` with a label `phase`."""

    def __init__(self, experiment: str, run: str, rank: int) -> None:
        from ray.util.metrics import Gauge

        labels = {"experiment": experiment, "run": run, "worker": str(rank)}
        self._tokens = Gauge("seqray_tokens_per_s", "Events that the worker reads in a second.", LABELS)
        self._share = Gauge("seqray_time_share", "Share of the worker's time.", (*LABELS, "phase"))
        for gauge in (self._tokens, self._share):
            gauge.set_default_tags(labels)

    def show(self, speed: Speed) -> None:
        """Sets them."""
        self._tokens.set(speed.own_tokens_per_s)
        for phase, share in speed.shares.items():
            self._share.set(share, {"phase": phase})
