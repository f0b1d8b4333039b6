"""Where a worker's time goes."""

import time
from pathlib import Path

import pytest
import torch
from shop_log import shop_config
from torch import nn

import train.clock
from train.clock import Clock
from train.fit import fit


def test_time_belongs_to_the_phase_that_began_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.clock, "SECONDS_BETWEEN_READINGS", 0.0)
    clock = Clock(torch.device("cpu"))
    for phase, seconds in (("data", 0.1), ("compute", 0.3), ("checkpoint", 0.1)):
        clock.begin(phase)  # type: ignore[arg-type]
        time.sleep(seconds)
    clock.pause()
    time.sleep(0.5)
    clock.begin("data")
    speed = clock.step(100, 60)
    assert speed is not None
    assert 0.5 <= speed.seconds < 1.0  # the pause does not count
    assert sum(speed.shares.values()) == pytest.approx(1)
    assert speed.shares["compute"] > speed.shares["data"] > 0.1
    assert speed.shares["communication"] == 0
    assert speed.tokens_per_s == pytest.approx(100 / speed.seconds)
    assert speed.own_tokens_per_s == pytest.approx(60 / speed.seconds)


def test_what_comes_after_the_last_gradient_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.clock, "SECONDS_BETWEEN_READINGS", 0.0)
    layer = nn.Linear(2, 2)
    clock = Clock(torch.device("cpu"), layer.parameters())
    clock.begin("compute")
    layer(torch.ones(1, 2)).sum().backward()
    time.sleep(0.2)  # as DDP waits for the others before backward() returns
    clock.gradients_are_summed()
    clock.begin("data")
    speed = clock.step(1, 1)
    assert speed is not None
    assert speed.shares["communication"] * speed.seconds >= 0.2


def test_the_log_tells_speed_and_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train.clock, "SECONDS_BETWEEN_READINGS", 0.0)
    fit(shop_config(tmp_path, train={"epochs": 1}))
    [line, *_] = [line for line in capsys.readouterr().out.splitlines() if "tokens/s" in line]
    for word in ("by this worker", "data ", "compute ", "communication 0%", "checkpoint ", "left"):
        assert word in line
