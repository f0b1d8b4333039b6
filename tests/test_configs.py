"""Every shipped config loads, and survives the way to a worker."""

from pathlib import Path

import pytest

from seqray.config import Config, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


def test_there_are_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"demo", "online_retail", "amazon_beauty", "movielens_1m"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_round_trips(path: Path) -> None:
    config = load_config(path)
    assert Config.parse(config.plain()) == config
    assert config.tune.space


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_takes_the_users_log(path: Path) -> None:
    assert load_config(path, ("data.path=mine.csv", "data.items.path=items.csv")).data.path == "mine.csv"


def test_amazon_beauty_is_the_published_recipe() -> None:
    config = load_config(CONFIGS[0].parent / "amazon_beauty.yaml").plain()
    assert (config["loss"]["type"], config["evaluate"]["exclude_seen"]) == ("softmax", True)
    assert (config["train"]["batch_size"], config["train"]["learning_rate"]) == (256, 1e-3)
    assert config["train"]["betas"] == [0.9, 0.98]
    sizes = {key: config["model"][key] for key in ("hidden_dim", "num_blocks", "num_heads", "dropout", "max_length")}
    assert sizes == {"hidden_dim": 64, "num_blocks": 2, "num_heads": 1, "dropout": 0.2, "max_length": 50}
