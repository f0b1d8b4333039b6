"""Replicas that follow the load, on a real server: up, down to none, and back, without a request lost."""

import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_config

from benchmarks.autoscaling import SETTINGS, Server, Watch, dear_bodies, load, serving
from benchmarks.autoscaling_report import Asked, Look, Rise, Step, first_fall, rises
from benchmarks.serve_targets import make_bundle
from seqray.errors import ConfigError

NUM_ITEMS = 20_000


def wait_until(what: Callable[[], bool], seconds: float = 60) -> None:
    """Fails when it does not come true."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_the_load_is_averaged_over_more_than_one_report() -> None:
    with pytest.raises(ConfigError, match=r"look_back_s 1 is not above metrics_interval_s 5"):
        tiny_config(metrics_interval_s=5)


def test_a_rise_is_told_by_when_a_replica_more_was_wanted_and_ran() -> None:
    steps = [Step(1, 2), Step(9, 4), Step(1, 4), Step(9, 2)]
    looks = [Look(0, 1, 0), Look(3, 1, 0), Look(3.5, 1, 1), Look(5, 2, 0), Look(8, 1, 0), Look(11, 1, 0)]
    assert rises(steps, looks) == [Rise(9, 1.5, 3), Rise(9, None, None)]
    assert rises(steps, [Look(0, 2, 0), Look(3, 2, 0)]) == []  # there was no room for more
    assert first_fall(steps, looks) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Serve's own, of what it does to itself
def test_replicas_follow_the_load_to_zero_and_back(free_port: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="as", dir="/tmp"))  # short: Ray's sockets are below it
    make_bundle(folder / "bundle", NUM_ITEMS)
    bodies = dear_bodies(folder, NUM_ITEMS)
    settings = [
        *SETTINGS, "serve.min_replicas=0", "serve.downscale_to_zero_delay_s=10", "serve.downscale_delay_s=2",
        "serve.max_queued_requests=2000",  # new replicas take their start from the same cores
    ]  # fmt: skip

    def ask(server: Server, watch: Watch, *steps: Step) -> list[Asked]:
        return asyncio.run(load(server.url, bodies, steps, watch.began))

    try:
        with serving(folder / "bundle", folder, free_port, settings) as server, Watch(server.cluster) as watch:
            steps = (Step(2, 4), Step(110, 6))
            asked = ask(server, watch, *steps)
            [rise] = rises(steps, watch.looks)
            assert rise.wanted is not None
            assert rise.wanted < 2
            wait_until(lambda: max(look.running for look in watch.looks) >= 2)
            wait_until(lambda: watch.looks[-1].running == 0)
            asked += ask(server, watch, Step(2, 5))
            wait_until(lambda: watch.looks[-1].running >= 1)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert len(asked) > 400
    assert {one.status for one in asked} == {"200"}
