"""However a model lies on the workers, it learns the same, and its checkpoints and bundle are those of one process."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from several import fit_with, leave_after, matters
from shop_log import shop_config

from seqray.bundle import Bundle
from seqray.config import Config
from train.fit import fit

LOSS_TOLERANCE, WEIGHT_TOLERANCE = 1e-5, 1e-4
"""Relative, of the losses of each epoch; absolute, of each weight after training."""
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "ddp 2": (2, {}),
    "ddp 2, accumulate 3": (2, {"train.accumulate_steps": 3}),
    "fsdp 2": (2, {"train.parallel": "fsdp"}),
    "fsdp 2, accumulate 2, checkpointed": (
        2, {"train.parallel": "fsdp", "train.accumulate_steps": 2, "train.activation_checkpointing": True}
    ),
}  # fmt: skip
"""Name -> (workers, what differs from one process)."""


def base(folder: Path) -> Config:
    """Norms of 0.1, so that every step is clipped; a weight decay, so that it must reach every weight."""
    train = {"epochs": 3, "batch_size": 13, "clip_norm": 0.1, "weight_decay": 0.01}
    return shop_config(folder, data=one_store(folder), model={"num_blocks": 2}, train=train)


def one_store(folder: Path) -> dict[str, object]:
    """For all runs."""
    return {"store": str(folder / "store")}


def history(bundle: Bundle, config: Config) -> list[dict[str, float]]:
    """The validations of the bundle's run."""
    checkpoint = next((Path(config.output) / "runs" / config.name / bundle.version).glob("checkpoints/step_*_end"))
    rows: list[dict[str, float]] = json.loads((checkpoint / "progress.json").read_text())["history"]
    return rows


def named(config: Config, layout: str) -> Config:
    return config.override({"name": layout.replace(" ", "_").replace(",", ""), **LAYOUTS[layout][1]})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(shop: Path) -> Iterator[Bundle]:
    return fit(base(shop))


@pytest.fixture(scope="module")
def bundles(shop: Path, alone: Bundle) -> dict[str, Bundle]:
    """Of each layout."""
    found = {}
    for world in {world for world, _ in LAYOUTS.values()}:
        names = [name for name, (workers, _) in LAYOUTS.items() if workers == world]
        found |= dict(zip(names, fit_with(world, *(named(base(shop), name) for name in names)), strict=True))
    return found


def assert_close(found: Bundle, expected: Bundle) -> None:
    """Of the same weights."""
    assert found.state.keys() == expected.state.keys()
    for name, tensor in found.state.items():
        pair = (matters(name, one) for one in (tensor, expected.state[name]))
        torch.testing.assert_close(*pair, rtol=0, atol=WEIGHT_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_losses_and_weights(shop: Path, alone: Bundle, bundles: dict[str, Bundle], layout: str) -> None:
    expected, found = history(alone, base(shop)), history(bundles[layout], named(base(shop), layout))
    assert [row["train/loss"] for row in found] == pytest.approx(
        [row["train/loss"] for row in expected], rel=LOSS_TOLERANCE
    )
    assert_close(bundles[layout], alone)
    for key, value in alone.metrics.items():
        if key.startswith("test/"):
            assert bundles[layout].metrics[key] == pytest.approx(value, abs=0.02)


def test_a_checkpoint_goes_on_under_any_layout(shop: Path, alone: Bundle) -> None:
    config = base(shop).override({"name": "changing"})
    leave_after(1, 2, config.override({"train.parallel": "fsdp"}))
    leave_after(1, 2, config)
    log = next((Path(config.output) / "runs" / "changing").glob("*/train.log"))
    assert "epoch 2/3" in log.read_text()
    bundle = fit(config)
    assert log.read_text().count("goes on from checkpoint") == 2
    assert [row["train/loss"] for row in history(bundle, config)] == pytest.approx(
        [row["train/loss"] for row in history(alone, base(shop))], rel=LOSS_TOLERANCE
    )
    assert_close(bundle, alone)


SMALL = {"hidden_dim": 16, "max_length": 8, "dropout": 0.0}
OTHERS: dict[str, dict[str, object]] = {
    "bsarec": {"type": "bsarec", **SMALL},
    "gru4rec": {"type": "gru4rec", **SMALL},
    "bert4rec": {"type": "bert4rec", **SMALL},
    "lora": {
        "type": "causal_lm", **SMALL, "lora": {"rank": 2},
        "architecture": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2,
        },
    },
}  # fmt: skip


def test_other_models_learn_the_same_too(shop: Path) -> None:
    loss = {"type": "gbce", "num_negatives": 8}
    configs = [
        shop_config(shop, name=name, data=one_store(shop), model=model, train={"epochs": 1}, loss=loss)
        for name, model in OTHERS.items()
    ]
    shared = [config.override({"name": f"{config.name}_fsdp", "train.parallel": "fsdp"}) for config in configs]
    for config, other, bundle in zip(configs, shared, fit_with(2, *shared), strict=True):
        expected = fit(config)
        losses = [history(one, of)[0]["train/loss"] for one, of in ((bundle, other), (expected, config))]
        assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE), config.name
        assert_close(bundle, expected)
