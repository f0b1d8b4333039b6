import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from seqray.errors import ConfigError
from seqray.program_config import TrackingConfig
from seqray.tracking import Limits, Tracker, resolve_mode

ROOT = Path(__file__).resolve().parents[1]
CLOSED = "http://127.0.0.1:9"
FAKE_KEY = "a" * 40
LIMITS = Limits()


@pytest.fixture(autouse=True)
def no_wandb_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))


def tracker(folder: Path, mode: str = "offline", limits: Limits = LIMITS, run_id: str = "run-1") -> Tracker:
    return Tracker(
        TrackingConfig(mode=mode),  # type: ignore[arg-type]
        folder,
        run_id=run_id,
        name="shoes",
        group="shoes",
        tags=("train",),
        settings={"train": {"learning_rate": 0.001}},
        limits=limits,
    )


def recorded(run_folder: Path) -> list[Any]:
    """The records of a run's .wandb file, a LevelDB log: blocks of 32 KiB of (checksum 4, length 2, kind 1, data)."""
    from wandb.proto import wandb_internal_pb2

    (file,) = run_folder.glob("run-*.wandb")
    data, at, parts, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records


def history(run_folder: Path) -> list[dict[str, Any]]:
    rows = [record.history for record in recorded(run_folder) if record.WhichOneof("record_type") == "history"]
    return [
        {"step": row.step.num}
        | {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in row.item}
        for row in rows
    ]


def test_an_offline_run_holds_metrics_summary_and_config(tmp_path: Path) -> None:
    run = tracker(tmp_path)
    for step in range(3):
        run.log({"train/loss": 1.0 / (step + 1), "val/ndcg@10": 0.1 * step}, step=10 * step)
    run.summary({"bundle": "bundles/x"})
    run.finish()
    assert run.mode == "offline"
    assert run.run_folder is not None
    assert run.run_folder.is_relative_to(tmp_path / "wandb")
    rows = history(run.run_folder)
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert [row["train/loss"] for row in rows] == [1.0, 0.5, 1.0 / 3]
    assert rows[2]["val/ndcg@10"] == 0.2
    records = recorded(run.run_folder)
    start = next(record.run for record in records if record.WhichOneof("record_type") == "run")
    assert (start.run_id, start.project, start.display_name, start.run_group) == ("run-1", "seqray", "shoes", "shoes")
    assert {item.key: json.loads(item.value_json) for item in start.config.update}["train"] == {"learning_rate": 0.001}
    summary = {item.key: json.loads(item.value_json) for r in records for item in r.summary.update}
    assert summary["bundle"] == "bundles/x"


def test_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first = tracker(tmp_path)
    first.log({"train/loss": 2.0}, step=1)
    first.finish(exit_code=1)
    time.sleep(1.1)  # W&B names the folder by the second
    second = tracker(tmp_path)
    second.log({"train/loss": 1.0}, step=2)
    second.finish()
    folders = [first.run_folder, second.run_folder]
    assert None not in folders
    assert folders[0] != folders[1]
    ids = {r.run.run_id for f in folders if f for r in recorded(f) if r.WhichOneof("record_type") == "run"}
    assert ids == {"run-1"}
    assert second.run_folder is not None
    assert history(second.run_folder)[0]["step"] == 2


def test_disabled_never_imports_wandb(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from seqray.program_config import TrackingConfig\n"
        "from seqray.tracking import Tracker\n"
        f"t = Tracker(TrackingConfig(mode='disabled'), Path({str(tmp_path)!r}), run_id='r', name='n', group='g',"
        " tags=(), settings={})\n"
        "t.log({'a': 1.0}, 1); t.summary({'b': 2}); t.finish()\n"
        "print(sorted({'wandb', 'torch', 'ray'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_leaves_an_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    monkeypatch.setenv("WANDB_API_KEY", FAKE_KEY)
    start = time.monotonic()
    run = tracker(tmp_path, "online", Limits(init_s=4.0, finish_online_s=60.0, finish_offline_s=60.0), run_id="away")
    for step in range(100):
        run.log({"train/loss": 1.0}, step=step)
    assert time.monotonic() - start < 3.0, "log waited for W&B"
    run.finish()
    assert run.mode == "offline"
    assert run.run_folder is not None
    assert len(history(run.run_folder)) == 100
    warnings = [line for line in capfd.readouterr().err.splitlines() if line]
    assert len(warnings) == 1, warnings
    assert warnings[0].startswith("warning: W&B did not start; this run is recorded offline, later: wandb sync ")
    assert FAKE_KEY not in warnings[0]


def test_finish_returns_within_its_limit_and_so_does_the_process(tmp_path: Path) -> None:
    code = (
        "import time; from pathlib import Path; from seqray.program_config import TrackingConfig\n"
        "from seqray.tracking import Limits, Tracker\n"
        f"t = Tracker(TrackingConfig(mode='online'), Path({str(tmp_path)!r}), run_id='r', name='n', group='g', tags=(),"
        " settings={}, limits=Limits(init_s=8.0, finish_online_s=1.0))\n"
        "t.log({'a': 1.0}, 1); start = time.monotonic(); t.finish(); print(time.monotonic() - start)"
    )
    environment = {**os.environ, "WANDB_BASE_URL": CLOSED, "WANDB_API_KEY": FAKE_KEY}
    start = time.monotonic()
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert 0.5 < float(out.stdout) < 6.0
    assert "did not finish within 1 s" in out.stderr
    assert time.monotonic() - start < 40.0


def test_a_full_queue_drops_the_oldest(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tracker(tmp_path, limits=Limits(records=5), run_id="full")
    for step in range(50):  # W&B's import alone takes longer than this loop
        run.log({"train/loss": float(step)}, step=step)
    run.finish()
    assert run.run_folder is not None
    steps = [row["step"] for row in history(run.run_folder)]
    assert steps[-1] == 49
    assert f"W&B was too slow for {50 - len(steps)} of the records" in capfd.readouterr().err


def test_online_without_a_key_never_asks_for_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tracker(tmp_path, "online", run_id="keyless")
    run.log({"train/loss": 1.0}, step=1)
    run.finish()
    assert run.mode == "offline"
    assert capfd.readouterr().err.startswith("warning: no W&B key is set; this run is recorded offline, later: wandb")


def test_a_failing_metric_does_not_reach_training(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = tracker(tmp_path, run_id="bad")
    run.log({1: 2.0}, step=1)  # type: ignore[dict-item]
    run.finish()
    run.log({"train/loss": 1.0}, step=2)
    run.finish()
    assert "warning: W&B failed; later: wandb sync " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("environment", "netrc", "expected"),
    [
        ({}, "", "offline"),
        ({"WANDB_API_KEY": FAKE_KEY}, "", "online"),
        ({}, f"machine api.wandb.ai login user password {FAKE_KEY}", "online"),
        ({}, f"machine other.example login user password {FAKE_KEY}", "offline"),
        ({"WANDB_BASE_URL": "https://other.example"}, f"machine other.example password {FAKE_KEY}", "online"),
        ({}, "machine machine machine", "offline"),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": FAKE_KEY}, "", "disabled"),
        ({"WANDB_MODE": "dryrun", "WANDB_API_KEY": FAKE_KEY}, "", "offline"),
    ],
)
def test_auto_asks_the_environment(
    environment: dict[str, str], netrc: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert resolve_mode(TrackingConfig()) == expected


def test_a_server_of_ones_own_is_found_in_the_settings_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "wandb-config"
    folder.mkdir()
    (folder / "settings").write_text("[default]\nbase_url = https://wandb.shop.example\n")
    (tmp_path / "netrc").write_text(f"machine wandb.shop.example login user password {FAKE_KEY}")
    assert resolve_mode(TrackingConfig()) == "online"


def test_the_config_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    assert resolve_mode(TrackingConfig(mode="offline")) == "offline"


def test_an_unknown_wandb_mode_names_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "onlin")
    with pytest.raises(ConfigError, match=r"WANDB_MODE: 'onlin' is none of online, offline"):
        resolve_mode(TrackingConfig())
