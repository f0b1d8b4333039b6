"""However a model lies on the workers, it learns the same, and its checkpoints and bundle are those of one process."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from several import fit_with, leave_after, matters
from shop_log import shop_config
from struck import job_of, run_workers

from seqray.bundle import Bundle
from seqray.config import Config
from seqray.errors import ConfigError
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
    "vocabulary 2": (2, {"train.vocabulary_parallel": 2}),
    "vocabulary 2, accumulate 2, in chunks": (
        2, {"train.vocabulary_parallel": 2, "train.accumulate_steps": 2, "loss.chunk_elements": 99}
    ),
    "vocabulary 2, fsdp": (2, {"train.vocabulary_parallel": 2, "train.parallel": "fsdp"}),
    "vocabulary 2 x data 2": (4, {"train.vocabulary_parallel": 2}),
    "vocabulary 2 x data 2, fsdp": (4, {"train.vocabulary_parallel": 2, "train.parallel": "fsdp"}),
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
    workers, changes = LAYOUTS[layout]
    name = layout.replace(" ", "_").replace(",", "")
    return config.override({"name": name, "train.num_workers": workers, **changes})


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
    both = {"train.parallel": "fsdp", "train.num_workers": 2, "train.vocabulary_parallel": 2}
    leave_after(1, 2, config.override(both))
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
BLOCKS = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
OTHERS: dict[str, dict[str, object]] = {
    "bsarec": {"type": "bsarec", **SMALL},
    "gru4rec": {"type": "gru4rec", **SMALL},
    "bert4rec": {"type": "bert4rec", **SMALL, "mask_share": 0.05},
    "lora": {"type": "causal_lm", **SMALL, "lora": {"rank": 2}, "architecture": BLOCKS},
    "columns": {
        "type": "sasrec", **SMALL, "item_columns": [{"column": "train_events", "buckets": 3}], "separate_output": True,
        "normalize": True, "temperature": 0.1,
    },
    "basket": {"type": "basket", **SMALL},
}  # fmt: skip


def other(folder: Path, name: str, loss: dict[str, object]) -> Config:
    """An epoch of another model, whose answers leave out what was seen."""
    target = "next_basket" if name == "basket" else "next_item"
    train = {"epochs": 1, "batch_size": 13, "target": target, "weigh": "baskets" if name == "basket" else "items"}
    return shop_config(
        folder, name=f"{name}_{loss['type']}", data=one_store(folder), model=OTHERS[name], loss=loss, train=train,
        evaluate={"exclude_seen": True},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("names", "loss", "layout"),
    [
        (("bsarec", "gru4rec", "lora"), {"type": "gbce", "num_negatives": 8}, {"train.parallel": "fsdp"}),
        (
            ("gru4rec", "bert4rec", "lora", "columns", "basket"), {"type": "softmax"},
            {"train.num_workers": 2, "train.vocabulary_parallel": 2},
        ),
    ],
    ids=["fsdp", "vocabulary"],
)  # fmt: skip
def test_other_models_learn_the_same_too(
    shop: Path, names: tuple[str, ...], loss: dict[str, object], layout: dict[str, object]
) -> None:
    configs = [other(shop, name, loss) for name in names]
    shared = [config.override({"name": f"{config.name}_shared", **layout}) for config in configs]
    for config, spread, bundle in zip(configs, shared, fit_with(2, *shared), strict=True):
        expected = fit(config)
        losses = [history(one, of)[0]["train/loss"] for one, of in ((bundle, spread), (expected, config))]
        assert losses[0] == pytest.approx(losses[1], rel=LOSS_TOLERANCE), config.name
        assert_close(bundle, expected)
        assert bundle.metrics["test/ndcg@10"] == pytest.approx(expected.metrics["test/ndcg@10"], abs=0.02), config.name


def test_no_worker_holds_it_all(shop: Path, bundles: dict[str, Bundle]) -> None:
    shares = {}
    for layout in LAYOUTS:
        log = (
            shop / "out" / "runs" / named(base(shop), layout).name / bundles[layout].version / "train.log"
        ).read_text()
        found = re.search(r"([0-9,]+) parameters(?: \(([0-9,]+) in the first worker\))?", log)
        assert found is not None
        whole, held = (int(number.replace(",", "")) for number in (found[1], found[2] or found[1]))
        shares[layout] = held / whole
    assert shares["ddp 2"] == 1
    assert shares["fsdp 2"] < 0.52
    assert shares["vocabulary 2, fsdp"] < 0.52
    assert shares["vocabulary 2 x data 2, fsdp"] < 0.3
    assert shares["vocabulary 2"] < 1


def test_what_vocabulary_parallel_cannot_do_is_told(shop: Path) -> None:
    with pytest.raises(ConfigError, match=r"vocabulary_parallel 2 does not divide num_workers 3"):
        base(shop).override({"train.num_workers": 3, "train.vocabulary_parallel": 2})
    with pytest.raises(ConfigError, match=r"train\.vocabulary_parallel works with loss\.type softmax, not bce"):
        base(shop).override({"train.num_workers": 2, "train.vocabulary_parallel": 2, "loss.type": "bce"})
    other_table = base(shop).override({
        "name": "other_table", "train.num_workers": 2, "train.vocabulary_parallel": 2,
        "model.type": "broken_models:LooksAhead",
    })  # fmt: skip
    (first, second) = run_workers(job_of(other_table, shop).plain(), 2, shop)
    assert "train.vocabulary_parallel: the model's item_weights() are not the rows of" in str(first)
    assert second == first


def test_a_run_in_shards_starts_from_a_bundle(shop: Path, alone: Bundle) -> None:
    child = base(shop).override({"name": "child", "train.epochs": 1, "train.init_from": str(alone.folder)})
    both = {"train.parallel": "fsdp", "train.num_workers": 2, "train.vocabulary_parallel": 2}
    (bundle,) = fit_with(2, child.override({"name": "child_shared", **both}))
    assert_close(bundle, fit(child))


def test_shards_multiply_in_bf16_too(shop: Path) -> None:
    config = base(shop).override({"name": "bf16", "train.precision": "bf16", "train.epochs": 1})
    layout = {"name": "bf16_shared", "train.num_workers": 2, "train.vocabulary_parallel": 2}
    (bundle,) = fit_with(2, config.override(layout))
    losses = [
        history(one, config.override({"name": one.config.name}))[0]["train/loss"] for one in (bundle, fit(config))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["fsdp 2", "vocabulary 2", "vocabulary 2, fsdp"])
def test_a_resumed_run_equals_an_unbroken_one_to_the_last_bit(tmp_path: Path, layout: str) -> None:
    config = named(base(tmp_path), layout).override({"name": "whole", "model.dropout": 0.3})
    cut = config.override({"name": "cut"})
    (whole,) = fit_with(2, config)
    leave_after(1, 2, cut)
    (resumed,) = fit_with(2, cut)
    assert all(torch.equal(tensor, resumed.state[name]) for name, tensor in whole.state.items())
