"""Every shipped config loads, and survives the way to a worker."""

from pathlib import Path

import pytest
import yaml

from seqray.config import Config, load_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


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


def test_amazon_beauty_has_the_published_protocol() -> None:
    config = load_config(ROOT / "configs" / "amazon_beauty.yaml").plain()
    assert (config["data"]["split"]["type"], config["data"]["tie_order"]) == ("leave_one_out", "file")
    assert (config["evaluate"]["exclude_seen"], config["model"]["max_length"]) == (True, 50)


@pytest.mark.parametrize(
    ("config", "variants"),
    [("amazon_beauty", "beauty_ablation"), ("online_retail", "online_retail_variants")],
)
def test_every_variant_of_a_benchmark_loads(config: str, variants: str) -> None:
    rows = yaml.safe_load((ROOT / "benchmarks" / f"{variants}.yaml").read_text(encoding="utf-8"))
    resolved = {label: load_config(ROOT / "configs" / f"{config}.yaml", tuple(row)) for label, row in rows.items()}
    assert len({one.yaml() for one in resolved.values()}) == len(rows)


def test_published_rows_stand_beside_the_configs_that_they_name() -> None:
    published = yaml.safe_load((ROOT / "benchmarks" / "published.yaml").read_text(encoding="utf-8"))
    assert set(published) <= {load_config(path).name for path in CONFIGS}
    for table in published.values():
        assert all(len(values) == len(table["metrics"]) for values in table["rows"].values())
