"""A loss that is no number on one worker of two: all agree in the same step, and stop or skip it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from shop_log import shop_config
from struck import job_of, progress_in, run_workers
from torch import nn

from seqray.config import Config
from seqray.evaluation import Part
from train.finite import MOST_IN_A_ROW, Finite, TrainingError
from train.fit import fit
from train.runs import Run

SIXTH_STEP = "train 7 1 nan"
"""Of the second worker; several workers call the model once before the first step (`Parallel.warm_up`)."""


def struck_config(folder: Path, **train: Any) -> Config:
    model = {"type": "broken_models:Struck", "order": str(folder / "order")}
    return shop_config(folder, model=model, train={"epochs": 3, **train})


def test_stop_ends_all_workers_in_the_same_step_and_names_it(tmp_path: Path) -> None:
    job = job_of(struck_config(tmp_path), tmp_path)
    (tmp_path / "order").write_text(SIXTH_STEP)
    first, second = run_workers(job.plain(), 2, tmp_path)
    assert first == second
    assert first is not None
    assert first.startswith("step 6 (epoch 2, step 2 of 4): the loss of worker 1 is no number")
    # Nothing of the bad step has reached a checkpoint.
    assert progress_in(Path(job.run_folder))["global_step"] == 4


def test_skip_leaves_the_step_out_on_all_workers(tmp_path: Path) -> None:
    job = job_of(struck_config(tmp_path, on_nan="skip"), tmp_path)
    (tmp_path / "order").write_text(SIXTH_STEP)
    assert run_workers(job.plain(), 2, tmp_path) == [None, None]
    log = (Path(job.run_folder) / "train.log").read_text()
    assert "step 6 (epoch 2, step 2 of 4) skipped: the loss of worker 1 is no number" in log
    two = progress_in(Path(job.run_folder))
    alone = struck_config(tmp_path, on_nan="skip").override({"name": "alone"})
    (tmp_path / "order").write_text("train 6 0 nan")
    bundle = fit(alone)
    one = progress_in(next((tmp_path / "out" / "runs" / "alone").iterdir()))
    assert one["skipped_steps"] == two["skipped_steps"] == bundle.metrics["skipped_steps"] == 1
    for left, right in zip(one["history"], two["history"], strict=True):
        assert left["train/loss"] == pytest.approx(right["train/loss"], rel=1e-4)


def test_a_run_that_stopped_goes_on_with_skip(tmp_path: Path) -> None:
    config = struck_config(tmp_path)
    (tmp_path / "order").write_text("train 6 0 nan")
    with pytest.raises(TrainingError, match=r"step 6 .*on_nan=skip"):
        fit(config)
    (tmp_path / "order").write_text("train 2 0 nan")
    bundle = fit(config.override({"train.on_nan": "skip"}))
    assert bundle.metrics["skipped_steps"] == 1
    assert Run.load(next((tmp_path / "out" / "runs" / "shop").iterdir())).attempt == 2


def guarded(policy: str) -> tuple[Finite, nn.Parameter, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(3))
    finite = Finite(policy, Part(), torch.device("cpu"), lambda _: None)  # type: ignore[arg-type]
    return finite, weight, torch.optim.AdamW([weight], 0.1, fused=True)


def test_a_loss_that_is_no_number_but_has_finite_gradients_is_seen() -> None:
    finite, weight, optimizer = guarded("skip")
    loss = weight.sum() + torch.tensor(float("inf"))
    (loss * finite.factor(loss)).backward()
    norm = nn.utils.clip_grad_norm_([weight], 5.0)
    assert not finite.step(optimizer, loss, norm, 1)
    assert torch.equal(weight.detach(), torch.ones(3))
    assert finite.look(4) == 1
    assert finite.look(4) == 0


def test_skipping_has_an_end() -> None:
    finite, weight, optimizer = guarded("skip")
    for step in range(1, MOST_IN_A_ROW + 1):
        weight.grad = torch.full((3,), float("nan"))
        finite.step(optimizer, weight.sum(), nn.utils.clip_grad_norm_([weight], 5.0), step)
    with pytest.raises(TrainingError, match=r"step 1 \(epoch 1, step 1 of 4\): the gradients are no numbers.*in a row"):
        finite.look(4)
