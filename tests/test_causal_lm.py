"""CausalLM: any Hugging Face decoder over item embeddings, from its sizes or pretrained, with adapters, in a bundle."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from shop_log import shop_config

from seqray.bundle import Bundle
from seqray.catalogue import Catalogue
from seqray.config import Config
from seqray.conformance import check_model, check_repeatable
from seqray.errors import ConfigError
from seqray.model_sections import CausalLMConfig
from seqray.models.causal_lm import CausalLM
from seqray.program_config import TrainConfig
from seqray.recommender import Query, Recommender
from seqray.sequences import Batch
from train.fit import fit
from train.optimizer import build_optimizer
from train.state import TrainState

LLAMA = {
    "model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16}


def causal_lm(**fields: Any) -> CausalLMConfig:
    return CausalLMConfig.model_validate({"hidden_dim": 32, "max_length": 8, "dropout": 0.0, **fields})


def build(config: CausalLMConfig) -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(config, Catalogue(12)).eval()


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `save_pretrained` writes it, of a language model with 50 words."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("pretrained") / "llama"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**LLAMA, vocab_size=50)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=lambda architecture: architecture["model_type"])
def test_conformance(architecture: dict[str, Any]) -> None:
    check_model(causal_lm(architecture=architecture))


def test_the_words_of_the_backbone_are_dropped() -> None:
    model = build(causal_lm(architecture=LLAMA))
    assert not [name for name in model.state_dict() if "embed_tokens" in name]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_pretrained_backbone_keeps_its_weights(pretrained: Path) -> None:
    from safetensors.torch import load_file

    given = load_file(pretrained / "model.safetensors")
    model = build(causal_lm(pretrained=str(pretrained)))
    state = model.backbone.state_dict()
    assert state and all(torch.equal(state[name], given[f"model.{name}"]) for name in state)
    check_repeatable(causal_lm(pretrained=str(pretrained)))


def test_another_width_is_projected(pretrained: Path) -> None:
    model = build(causal_lm(pretrained=str(pretrained), hidden_dim=24))
    assert model.encode(Batch(torch.tensor([1, 2]), torch.tensor([2]))).shape == (2, 24)
    assert (model.into.weight.shape, model.back.weight.shape) == ((32, 24), (24, 32))


def test_with_lora_only_adapters_and_items_learn(pretrained: Path) -> None:
    model = build(causal_lm(pretrained=str(pretrained), lora={"rank": 2})).train()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {"items.embedding.weight"}
    assert len(trained) == 1 + 2 * 7  # two for each of the seven linear layers of the block
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for _ in range(2):  # at first one half of an adapter is zero, and the other has no gradient
        model.encode(Batch(torch.tensor([1, 2, 3]), torch.tensor([3]))).square().sum().backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == trained


def test_lora_goes_where_it_is_sent(pretrained: Path) -> None:
    model = build(causal_lm(pretrained=str(pretrained), lora={"target_modules": ["q_proj"]}))
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_" in name} == {"q_proj"}


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(causal_lm(architecture=LLAMA, gradient_checkpointing=checkpointing)).train()
        model.encode(Batch(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([3, 2]))).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.allclose(one, other) for one, other in zip(*gradients, strict=True))


@pytest.mark.parametrize("lora", [None, {"rank": 2}], ids=["all", "lora"])
def test_a_bundle_is_served_without_the_pretrained_folder(
    tmp_path: Path, pretrained: Path, lora: dict[str, int] | None
) -> None:
    folder = tmp_path / "llama"
    shutil.copytree(pretrained, folder)
    model = {"type": "causal_lm", "hidden_dim": 32, "max_length": 8, "pretrained": str(folder), "lora": lora}
    config = shop_config(tmp_path, model=model, train={"epochs": 6})
    bundle = fit(config)
    shutil.rmtree(folder)
    again = Bundle.load(bundle.folder)
    assert str(folder) not in (bundle.folder / "config.yaml").read_text()
    assert again.config.plain()["model"]["architecture"]["model_type"] == "llama"
    assert again.metrics["test/ndcg@10"] > again.metrics["baselines"]["popularity"]["test/ndcg@10"]
    [answer] = Recommender(again).recommend([Query((104, 105, 106), k=3)])
    assert answer.items[0].source == "model"
    history = Batch(torch.tensor([4, 5, 6]), torch.tensor([3])).ask_last()
    with torch.no_grad():
        assert torch.equal(again.model().encode(history), bundle.model().encode(history))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": {"model_type": "lama"}}, r"model\.architecture\.model_type: 'lama' .*choices: .*llama"),
        ({"architecture": {}}, r"model\.architecture\.model_type: None"),
        ({"architecture": {**LLAMA, "num_layer": 3}}, r"model\.architecture\.num_layer: .*nearest: num_hidden_layers"),
        ({"architecture": {**LLAMA, "auto_map": {"AutoModel": "evil.Model"}}}, r"model\.architecture\.auto_map"),
        ({"architecture": {**LLAMA, "attn_implementation": "a/b"}}, r"model\.architecture\.attn_implementation"),
        ({"architecture": {**LLAMA, "hidden_size": 33}}, r"model\.architecture: cannot build"),
        ({"architecture": {"model_type": "bert", "hidden_size": 24, "num_hidden_layers": 1}}, "bert is not a decoder"),
        ({"architecture": {"model_type": "t5", "d_model": 16, "num_layers": 1}}, "t5 does not read embeddings"),
        ({"architecture": GPT2, "max_length": 17}, r"model\.max_length: 17 is more than the 16"),
        ({"pretrained": "./nowhere/at/all"}, r"model\.pretrained: cannot build '\./nowhere/at/all'"),
        ({"architecture": LLAMA, "lora": {"target_modules": ["nowhere"]}}, r"target_modules: .*choices: .*q_proj"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(causal_lm(**fields))


@pytest.mark.parametrize("both", [{}, {"architecture": LLAMA, "pretrained": "x"}])
def test_a_backbone_is_either_new_or_pretrained(tmp_path: Path, both: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either architecture or pretrained"):
        shop_config(tmp_path, model={"type": "causal_lm", **both})


def test_lora_without_peft_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="pip install peft"):
        build(causal_lm(architecture=LLAMA, lora={}))


def test_a_config_needs_no_transformers(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    config = shop_config(tmp_path, model={"type": "causal_lm", "architecture": LLAMA, "lora": {"rank": 4}})
    assert Config.parse(config.plain()) == config
    path.write_text(config.yaml())
    program = (
        "import sys; from seqray.config import load_config; import seqray.models.protocol\n"
        f"assert load_config({str(path)!r}, ('model.lora.rank=2',)).model.lora.rank == 2\n"
        "sys.exit('transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_a_run_with_frozen_weights_goes_on_from_its_checkpoint() -> None:
    model = build(causal_lm(architecture=LLAMA, lora={"rank": 2})).train()
    state = TrainState(model, build_optimizer(model, TrainConfig()))
    batch = Batch(torch.tensor([1, 2, 3]), torch.tensor([3]))
    model.encode(batch).sum().backward()
    state.optimizer.step()
    other = build(causal_lm(architecture=LLAMA, lora={"rank": 2}))
    resumed = TrainState(other, build_optimizer(other, TrainConfig()))
    resumed.restore(state.snapshot())
    assert torch.equal(other.eval().encode(batch), model.eval().encode(batch))
    steps = [slot["step"].item() for slot in resumed.optimizer.state_dict()["state"].values()]
    assert steps == [1.0] * len(steps) and steps
