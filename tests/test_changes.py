"""Config, data or code changed while a run is unfinished: refused with the difference, unless accepted."""

import shutil
import sys
from pathlib import Path

import pytest
from shop_log import shop_config, write_log

from seqray.config import Config
from seqray.errors import ConfigError
from train.code import code_differences, code_of
from train.fit import fit
from train.runs import Run

MODEL = """
from seqray.model_sections import SASRecConfig
from seqray.models.sasrec import SASRec


class MineConfig(SASRecConfig):
    type: str = "my_model:Mine"


class Mine(SASRec):
    Config = MineConfig
"""


def unfinished(config: Config) -> Run:
    """A run of `config` as a killed command leaves it behind."""
    bundle = fit(config)
    shutil.rmtree(bundle.folder)
    return Run.load(Path(config.output) / "runs" / config.name / bundle.folder.name).mark("unfinished")


def test_changed_code_is_refused_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_model.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = {"type": "my_model:Mine", "hidden_dim": 16, "num_blocks": 1, "dropout": 0.0, "max_length": 8}
    config = shop_config(tmp_path, model=model, train={"epochs": 1})
    try:
        run = unfinished(config)
        (tmp_path / "my_model.py").write_text(MODEL + "# changed\n")
        with pytest.raises(ConfigError, match=r"code: my_model\.py: \w{12} -> \w{12}\n.*--accept-changes"):
            fit(config)
        assert fit(config, accept_changes=True).folder.name == run.id
    finally:
        sys.modules.pop("my_model", None)
    changes = Run.load(run.folder).changes
    assert len(changes) == 1
    assert changes[0].startswith("code: my_model.py")


def test_changed_data_is_accepted_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    run = unfinished(config)
    write_log(tmp_path, num_users=70)  # more users, the same items
    with pytest.raises(ConfigError, match=r"data: the content of the prepared store has changed \(sequences.arrow"):
        fit(config)
    bundle = fit(config, accept_changes=True)
    assert bundle.folder.name == run.id
    assert "goes on with what has changed:\n  data: " in capsys.readouterr().out
    assert bundle.manifest["data_fingerprint"] == Run.load(run.folder).content != run.content


def test_a_changed_config_is_accepted_when_asked(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    run = unfinished(config)
    bundle = fit(config.override({"train.learning_rate": 0.02}), accept_changes=True)
    assert bundle.folder.name == run.id
    assert bundle.config.train.learning_rate == 0.02
    assert Run.load(run.folder).changes == ["train.learning_rate: 0.01 -> 0.02"]


def test_what_the_checkpoint_cannot_follow_is_refused(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    unfinished(config)
    with pytest.raises(ConfigError, match=r"checkpoint step_000000004_end: its weights are not of this model"):
        fit(config.override({"model.hidden_dim": 32}), accept_changes=True)


def test_code_is_told_apart_by_its_files(tmp_path: Path) -> None:
    code = code_of(shop_config(tmp_path))
    assert {"seqray/losses.py", "train/trainer.py", "torch", "commit"} <= set(code)
    assert code_differences({}, code) == []  # a run from before code was recorded
    assert code_differences(code, code | {"commit": "another"}) == []
    lines = code_differences(code, code | {"torch": "9.0", "commit": "another"})
    assert lines[0].startswith("code: torch: ")
    assert lines[1] == f"code: commit {code['commit']} -> another"
    gone = {name: digest for name, digest in code.items() if name in {"commit", "torch"}}
    assert code_differences(code, gone)[-1].endswith("more files")
