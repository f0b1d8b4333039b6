"""CausalLM: a Hugging Face decoder (Llama, Qwen, GPT-2, Mamba, ...) that reads item embeddings instead of words.

Shapes: T packed events, P asked events, B sequences, L longest of the batch, D hidden, W width of the backbone.
"""

import difflib
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel

from seqray.catalogue import Catalogue
from seqray.errors import ConfigError
from seqray.model_sections import CausalLMConfig, LoRAConfig
from seqray.models.dropout import Dropout
from seqray.models.grid import Grid
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.sequences import Batch

NO_WORDS = {"vocab_size": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""The backbone's own embedding is dropped, so it may be as small as can be."""
NOT_KEPT = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
"""What a backbone's config says of how it was saved."""
MISTAKES = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, StrictDataclassError)
"""What transformers raises for an architecture or a folder that it cannot use."""


class CausalLM(nn.Module):
    """Item embeddings in, hidden states out; linear layers lie between where the backbone has another width."""

    Config = CausalLMConfig

    def __init__(self, config: CausalLMConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self._config, self.max_length = config, config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.dropout = Dropout(config.dropout)
        backbone, self._architecture, width = _backbone(config)
        width_out = _checked_width(backbone, width, self._architecture["model_type"])
        same = width == width_out == config.hidden_dim
        self.into: nn.Module = nn.Identity() if same else nn.Linear(config.hidden_dim, width)
        self.back: nn.Module = nn.Identity() if same else nn.Linear(width_out, config.hidden_dim)
        for part in (self.items, self.events, self.into, self.back):
            part.apply(initialize)
        if config.gradient_checkpointing:
            backbone.activation_checkpointing_enable({"use_reentrant": False})
        self.backbone = backbone if config.lora is None else _with_adapters(backbone, config.lora)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after each asked event, from it and the events before it."""
        grid = Grid(batch.lengths_B)
        item_TD = self.dropout(self.events(self.items(batch.items_T), batch))
        real_BL = torch.arange(grid.L, device=item_TD.device) < batch.lengths_B.unsqueeze(1)
        hidden_BLW = _run(self.backbone, grid.pad(self.into(item_TD)), real_BL)
        return self.items.question(self.back(batch.asked(grid.pack(hidden_BLW))))

    def served_config(self) -> CausalLMConfig:
        """The section that builds this model where the pretrained one is not at hand."""
        return self._config.model_copy(update={"pretrained": None, "architecture": self._architecture})


def _run(backbone: nn.Module, input_BLW: Tensor, real_BL: Tensor) -> Tensor:
    output = backbone(inputs_embeds=input_BLW, attention_mask=real_BL.long(), use_cache=False)
    return cast(Tensor, output.last_hidden_state)


def _backbone(config: CausalLMConfig) -> tuple[Any, dict[str, Any], int]:
    """(decoder without its word embedding, what `architecture` builds it, width of its input)."""
    place = "model.architecture" if config.pretrained is None else "model.pretrained"
    try:
        if config.pretrained is None:
            backbone = AutoModel.from_config(_architecture(config.architecture or {}))
        else:
            backbone = AutoModel.from_pretrained(
                config.pretrained, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
            )
        width = int(backbone.get_input_embeddings().embedding_dim)
        backbone.set_input_embeddings(nn.Identity())
    except MISTAKES as error:
        wanted = config.pretrained or config.architecture
        raise ConfigError(f"{place}: cannot build {wanted!r}: {error}") from error
    limit = getattr(backbone.config, "max_position_embeddings", None)
    if limit is not None and limit < config.max_length:
        raise ConfigError(f"model.max_length: {config.max_length} is more than the {limit} positions of {place}")
    if config.gradient_checkpointing and not backbone.supports_gradient_checkpointing:
        raise ConfigError(f"model.gradient_checkpointing: {backbone.config.model_type} cannot do it")
    described = {key: value for key, value in backbone.config.to_diff_dict().items() if key not in NOT_KEPT}
    return backbone, {**described, **NO_WORDS}, width


def _architecture(sizes: dict[str, Any]) -> Any:
    """The transformers config of these sizes; ConfigError for an unknown model_type or key."""
    model_type = sizes.get("model_type")
    if model_type not in CONFIG_MAPPING:
        decoders = sorted(config.model_type for config in MODEL_FOR_CAUSAL_LM_MAPPING)
        near = difflib.get_close_matches(str(model_type), decoders, n=5, cutoff=0.4)
        choices = near or ["llama", "qwen3", "mistral", "gpt2", "gpt_neox", "mamba"]
        raise ConfigError(
            f"model.architecture.model_type: {model_type!r} is no architecture of transformers; choices: "
            f"{', '.join(choices)} and others"
        )
    config_class = CONFIG_MAPPING[model_type]
    keys = config_class().to_dict().keys() | config_class.attribute_map.keys()
    for key in sizes.keys() - keys:
        nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0)
        raise ConfigError(f"model.architecture.{key}: unknown key of {model_type}; nearest: {nearest[0]}")
    return AutoConfig.for_model(**{**sizes, **NO_WORDS})


@torch.no_grad()
def _checked_width(backbone: Any, width: int, model_type: str) -> int:
    """Width of the hidden states; ConfigError when a later event moves an earlier one, as in an encoder."""
    input_BLW = torch.linspace(-1, 1, 3 * width).view(1, 3, width)
    changed_BLW = torch.cat([input_BLW[:, :2], -input_BLW[:, 2:]], 1)
    real_BL, was_training = torch.ones(1, 3, dtype=torch.bool), backbone.training
    try:
        before, after = (_run(backbone.eval(), one, real_BL) for one in (input_BLW, changed_BLW))
    except MISTAKES as error:
        raise ConfigError(f"model: {model_type} does not read embeddings as a decoder does: {error}") from error
    if not torch.equal(before[:, :2], after[:, :2]):
        raise ConfigError(f"model: {model_type} is not a decoder: an event would see the ones after it")
    backbone.train(was_training)
    return int(before.shape[2])


def _with_adapters(backbone: Any, lora: LoRAConfig) -> nn.Module:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("model.lora: needs the package peft: pip install peft") from error
    targets = "all-linear" if lora.target_modules is None else list(lora.target_modules)
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets)
    try:
        adapted: nn.Module = inject_adapter_in_model(settings, backbone)
    except ValueError as error:
        linear = sorted({name.rpartition(".")[2] for name, part in backbone.named_modules() if _is_linear(part)})
        raise ConfigError(f"model.lora.target_modules: {error}; choices: {', '.join(linear)}") from error
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return adapted


def _is_linear(part: nn.Module) -> bool:
    return isinstance(part, nn.Linear) or type(part).__name__ == "Conv1D"  # GPT-2's word for a linear layer
