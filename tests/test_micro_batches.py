"""What makes a step fit into less memory leaves it as it was: micro-batches and activation checkpointing."""

from pathlib import Path

import pytest
import torch
from several import matters
from shop_log import shop_config
from torch import Tensor

from seqray.bundle import Bundle
from seqray.catalogue import Catalogue
from seqray.component import config_class
from seqray.errors import ConfigError
from seqray.models.protocol import Module, build_model
from seqray.sequences import Batch
from train.blocks import blocks_of, checkpoint_blocks
from train.fit import fit

SMALL = {"hidden_dim": 16, "num_blocks": 2, "max_length": 40, "dropout": 0.3}
LLAMA = {
    "type": "causal_lm", "hidden_dim": 16, "max_length": 40, "dropout": 0.3,
    "architecture": {
        "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2,
    },
}  # fmt: skip
MODELS = [{"type": name, **SMALL} for name in ("sasrec", "esasrec", "hstu", "bsarec", "bert4rec", "basket")] + [LLAMA]


def model_of(settings: dict[str, object]) -> Module:
    torch.manual_seed(0)
    kind = str(settings["type"])
    return build_model(config_class("model", kind).model_validate(settings), Catalogue(20)).train()


def batch() -> Batch:
    lengths_B = torch.tensor([40, 33, 2])
    return Batch(torch.randint(1, 21, (75,), generator=torch.Generator().manual_seed(1)), lengths_B).ask_last()


def pass_through(model: Module) -> tuple[int, list[Tensor]]:
    """(bytes that autograd keeps, gradients) of a pass with the masks of one seed."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(2)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total = model.encode(batch()).square().sum()
    total.backward()
    return sum(kept.values()), [weight.grad for weight in model.parameters() if weight.grad is not None]


@pytest.mark.parametrize("settings", MODELS, ids=[str(settings["type"]) for settings in MODELS])
def test_checkpointed_blocks_learn_the_same_from_less_memory(settings: dict[str, object]) -> None:
    usual, sparing = model_of(settings), model_of(settings)
    checkpoint_blocks(sparing)
    assert len(blocks_of(sparing)) == 2
    all_bytes, expected = pass_through(usual)
    few_bytes, found = pass_through(sparing)
    assert few_bytes < 0.6 * all_bytes
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_a_model_without_blocks_cannot_checkpoint_them() -> None:
    with pytest.raises(ConfigError, match=r"train\.activation_checkpointing.*no blocks"):
        checkpoint_blocks(model_of({"type": "gru4rec", **SMALL}))


def losses_and_weights(bundle: Bundle, folder: Path) -> tuple[list[float], dict[str, Tensor]]:
    import json

    checkpoint = max((folder / "out" / "runs" / bundle.config.name).glob("*/checkpoints/step_*_end"))
    history = json.loads((checkpoint / "progress.json").read_text())["history"]
    return [row["train/loss"] for row in history], bundle.state


@pytest.mark.parametrize("loss", [{"type": "softmax"}, {"type": "bce"}], ids=["softmax", "bce"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"type": "bert4rec", "hidden_dim": 16, "num_blocks": 1, "dropout": 0.0, "max_length": 8}],
    ids=["sasrec", "bert4rec"],
)
def test_micro_batches_add_up_to_the_step(tmp_path: Path, loss: dict[str, object], settings: dict[str, object]) -> None:
    # 60 sequences in batches of 13: the last step holds 8, so that one of 9 micro-batches has none.
    config = shop_config(tmp_path, model=settings, loss=loss, train={"epochs": 3, "batch_size": 13})
    whole = losses_and_weights(fit(config), tmp_path)
    parts = config.override({"name": "parts", "train.accumulate_steps": 9, "train.activation_checkpointing": True})
    losses, weights = losses_and_weights(fit(parts), tmp_path)
    assert losses == pytest.approx(whole[0], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(matters(name, tensor), matters(name, whole[1][name]), rtol=1e-3, atol=1e-4)
