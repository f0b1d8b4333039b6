"""A real search: a trial that fails costs one trial, a killed search goes on and repeats no finished trial."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ray.tune.experiment import Trial
from shop_log import shop_config

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.errors import ConfigError
from seqray.folder import Folder
from tune.picture import draw_search
from tune.search import search
from tune.strategy import Asha
from tune.trials import TrialRow, print_trials, read_trials

SPACE = {
    "model.hidden_dim": {"choice": [8, 13]},
    "train.learning_rate": {"loguniform": [1e-3, 3e-2]},
}


def whole(bundles: Path) -> list[Path]:
    """The bundles of a folder, without what a killed process left half done."""
    return [path for path in bundles.iterdir() if not path.name.startswith(".")]


def searched(folder: Path) -> Config:
    return shop_config(
        folder,
        model={"type": "broken_models:WideFails"},
        train={"epochs": 3, "checkpoint_steps": 2},
        tune={"space": SPACE, "num_trials": 6, "search": "random", "scheduler": "none", "max_concurrent": 1},
        cluster={"address": "local"},
    )


def test_a_search_without_a_space_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tune\.space"):
        search(shop_config(tmp_path))


@pytest.mark.timeout(900)
def test_a_killed_search_goes_on_and_a_failing_trial_costs_one_trial(tmp_path: Path) -> None:
    config = searched(tmp_path)
    path, result = tmp_path / "config.yaml", tmp_path / "result.json"
    path.write_text(config.yaml())
    command = [sys.executable, "-m", "tune", str(path), "--json", str(result)]
    log = tmp_path / "first.log"
    with log.open("w") as output:
        first = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 240
    bundles = tmp_path / "out" / "bundles" / "shop"
    while not (bundles.exists() and whole(bundles)):
        assert first.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    time.sleep(1.0)  # Ray Tune notes the finished trial
    first.send_signal(signal.SIGKILL)
    first.wait()
    finished_before = {bundle.name: (bundle / "manifest.json").read_bytes() for bundle in whole(bundles)}

    second = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "continues search" in second.stdout
    rows = read_trials(Folder.at(next((tmp_path / "out" / "searches" / "shop").iterdir())))
    assert [row.number for row in rows] == list(range(1, 7))
    failed = [row for row in rows if row.sample["model.hidden_dim"] == 13]
    fine = [row for row in rows if row.sample["model.hidden_dim"] == 8]
    assert failed and fine, "the seed drew only one of the two sizes"
    assert all(row.status == "failed" and "bad luck" in (row.error or "") for row in failed)
    assert all(row.status == "finished" and row.epochs == 3 for row in fine)
    assert {
        path.name: (path / "manifest.json").read_bytes() for path in whole(bundles)
    }.items() >= finished_before.items()
    assert len(whole(bundles)) == len(fine)

    best = max(fine, key=lambda row: row.best)
    answer = json.loads(result.read_text())
    assert answer["bundle"] == best.bundle
    assert answer["metrics"]["val/ndcg@10"] == best.best
    assert (
        Bundle.load(Path(answer["bundle"]), trusted=(config.model.type,)).config.model
        == config.override(best.sample).model
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_trials_with_two_workers_are_nested_train_runs(tmp_path: Path) -> None:
    config = shop_config(
        tmp_path,
        train={"epochs": 4, "num_workers": 2},
        tune={
            "space": {"train.learning_rate": {"loguniform": [1e-4, 3e-2]}}, "num_trials": 3, "grace_validations": 1,
            "reduction_factor": 2,
        },
    )  # fmt: skip
    path, result = tmp_path / "config.yaml", tmp_path / "result.json"
    path.write_text(config.yaml())
    command = [sys.executable, "-m", "tune", str(path), "--json", str(result)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read_trials(Folder.at(next((tmp_path / "out" / "searches" / "shop").iterdir())))
    assert {row.status for row in rows} <= {"finished", "stopped early"}
    assert json.loads(result.read_text())["bundle"] in [row.bundle for row in rows]


def test_asha_leaves_a_trial_alone_whose_training_is_over() -> None:
    asha = Asha(time_attr="epoch", metric="m", mode="max", max_t=9, grace_period=1, reduction_factor=2)
    trials = [Trial("run_trial", stub=True) for _ in range(2)]
    for trial in trials:
        asha.on_trial_add(None, trial)
    assert asha.on_trial_result(None, trials[0], {"epoch": 1, "m": 0.9, "training_over": 0.0}) == Asha.CONTINUE
    assert asha.on_trial_result(None, trials[1], {"epoch": 1, "m": 0.1, "training_over": 1.0}) == Asha.CONTINUE
    assert asha.on_trial_result(None, trials[1], {"epoch": 1, "m": 0.1, "training_over": 0.0}) == Asha.STOP


def test_the_table_and_the_picture_show_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        TrialRow(1, "finished", {"model.dropout": 0.1, "train.betas": [0.9, 0.98]}, 0.25, 4, 1.5, "b"),
        TrialRow(2, "stopped early", {"model.dropout": 0.2, "train.betas": "odd"}, 0.125, 4, 1.5),
        TrialRow(3, "failed", {"model.dropout": 0.3, "train.betas": [0.8, 0.9]}, -1.0, 0, 0.0, None, "out of luck"),
    ]
    print_trials(rows, "val/ndcg@10")
    printed = capsys.readouterr().out
    assert printed.index("0.2500") < printed.index("out of luck")
    assert draw_search(Folder.at(tmp_path), rows, "val/ndcg@10").path.read_bytes().startswith(b"\x89PNG")
