"""The example of a user's own model: it passes the suite, trains through the command, and its bundle recommends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from shop_log import write_log

from seqray.bundle import Bundle
from seqray.config import Config, load_config
from seqray.conformance import check_model
from seqray.errors import BundleError
from seqray.recommender import Query, Recommender

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "custom_model"
TYPE = "my_model:FadingAverage"


@pytest.fixture
def example_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLE)


@pytest.mark.usefixtures("example_on_path")
def test_the_example_passes_the_conformance_suite() -> None:
    from my_model import FadingAverageConfig

    check_model(FadingAverageConfig(type=TYPE, hidden_dim=32, max_length=8, dropout=0.1))


@pytest.mark.usefixtures("example_on_path")
def test_the_example_config_loads_and_knows_the_models_own_field() -> None:
    config = load_config(EXAMPLE / "config.yaml", ("model.slowest=0.5",))
    assert Config.parse(config.plain()) == config
    assert config.plain()["model"]["slowest"] == 0.5


def train(tmp_path: Path) -> Path:
    """Trains through the command, in a process that finds the module on PYTHONPATH; gives back the bundle."""
    overrides = [
        f"data.path={write_log(tmp_path)}", f"output={tmp_path / 'out'}", "train.num_workers=0", "train.device=cpu",
        "train.epochs=15", "train.batch_size=16", "train.learning_rate=0.01", "model.hidden_dim=16",
        "model.dropout=0", "tracking.mode=disabled",
    ]  # fmt: skip
    result = tmp_path / "result.json"
    command = [sys.executable, "-m", "train", str(EXAMPLE / "config.yaml"), *overrides, "--json", str(result)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLE)])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return Path(json.loads(result.read_text())["bundle"])


def test_the_example_trains_and_its_bundle_recommends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(tmp_path)
    monkeypatch.delitem(sys.modules, "my_model", raising=False)
    with pytest.raises(BundleError, match=TYPE):
        Bundle.load(folder)
    assert "my_model" not in sys.modules, "code of a bundle ran without the user's word"
    monkeypatch.syspath_prepend(EXAMPLE)
    bundle = Bundle.load(folder, trusted=(TYPE,))
    assert bundle.metrics["test/ndcg@10"] > 2 * bundle.metrics["baselines"]["popularity"]["test/ndcg@10"]
    [answer] = Recommender(bundle).recommend([Query((104, 105, 106), k=3)])
    assert answer.items[0].item_id == 107
