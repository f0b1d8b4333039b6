"""The sections of the built-in models. Free of PyTorch, as `seqray.sections` is."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from seqray.sections import Component, Section


class ItemColumn(Section):
    """A column of the item table that is added to the item embedding."""

    column: str
    """Name of the column, one of `data.items`."""
    buckets: int | None = Field(None, ge=2)
    """Numbers: cut into this many buckets of equal share. Not given: each value is a category of its own. An item
    with a list of values (also nested) has the mean of their embeddings, of the first 16."""


class SequenceModelConfig(Component):
    """What the built-in models share: sizes, inputs beside the item, and how a hidden state meets the items."""

    hidden_dim: int = Field(64, ge=1)
    """Width of the hidden states and of the item embedding."""
    max_length: int = Field(50, ge=1)
    """Events of the history that the model sees, the newest ones."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on embeddings and hidden states."""
    event_type: bool = False
    """Add an embedding of what happened (view, cart, purchase); needs data.event_types."""
    time_gap: bool = False
    """Add an embedding of the time until the next event (for the newest: until the query), log-bucketed."""
    season: bool = False
    """Add an embedding of the time of the year of the next event or query, and of its day of the week."""
    item_columns: tuple[ItemColumn, ...] = ()
    """Columns of the item table whose embeddings are added to the item's, in the history and in the output."""
    separate_output: bool = False
    """An output embedding of its own instead of the input's."""
    normalize: bool = False
    """L2-normalise hidden states and item weights, so that scores are cosines over `temperature`."""
    temperature: float = Field(1.0, gt=0)
    """Scores are divided by it; 0.05 goes well with `normalize`."""


class TransformerConfig(SequenceModelConfig):
    """What the attention models share."""

    num_blocks: int = Field(2, ge=1)
    """Blocks."""
    num_heads: int = Field(1, ge=1)
    """Attention heads; must divide hidden_dim."""
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on attention weights; as `dropout` when not given."""

    @property
    def attention_rate(self) -> float:
        """The dropout rate of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class FeedForwardConfig(TransformerConfig):
    """What the models with a feed-forward layer of any width share."""

    feedforward_dim: int | None = Field(None, ge=1)
    """Width inside the feed-forward layer; 4 x hidden_dim when not given."""


class PositionsConfig(FeedForwardConfig):
    """What SASRec and eSASRec share, which differ in their blocks alone."""

    positions_from: Literal["newest", "oldest"] = "newest"
    """Where positions count from. newest: as in most SASRecs. oldest: the hidden states of a row are those of its
    prefixes, so that training on rows asks the same questions as serving does.
    """


class SASRecConfig(PositionsConfig):
    """Sizes of a SASRec transformer (Kang and McAuley 2018)."""

    type: Literal["sasrec"] = "sasrec"


class BasketConfig(FeedForwardConfig):
    """A SASRec over baskets, with a head for repeat purchases."""

    type: Literal["basket"] = "basket"
    max_baskets: int = Field(200, ge=1)
    """Baskets that have a position of their own, counted from the newest; older ones share the last."""
    repeats: bool = True
    """Add learned scores for the items of the history."""


class BSARecConfig(TransformerConfig):
    """Attention mixed with a frequency filter (Shin et al. 2024); trained on every prefix of a history."""

    type: Literal["bsarec"] = "bsarec"
    alpha: float = Field(0.7, ge=0, le=1)
    """Share of the filter; the rest is attention."""
    frequencies: int = Field(5, ge=1)
    """Lowest frequencies that pass the filter unchanged, counted with both signs: 5 is the constant and two waves."""


class BERT4RecConfig(FeedForwardConfig):
    """A transformer that reads in both directions and learns to fill in masked events (Sun et al. 2019)."""

    type: Literal["bert4rec"] = "bert4rec"
    mask_share: float = Field(0.2, gt=0, lt=1)
    """Share of the events that are masked in training."""


class LoRAConfig(Section):
    """Low-rank adapters beside the frozen weights of a backbone (Hu et al. 2021); needs the package peft."""

    rank: int = Field(8, ge=1)
    """Rank of each adapter."""
    alpha: float = Field(16.0, gt=0)
    """Adapters are scaled by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on what goes into an adapter."""
    target_modules: tuple[str, ...] | None = Field(None, min_length=1)
    """Ends of the names of the layers that get one, such as q_proj; all linear layers when not given."""


class CausalLMConfig(SequenceModelConfig):
    """A Hugging Face decoder over item embeddings, with `architecture` or `pretrained`; its vocabulary is not used."""

    type: Literal["causal_lm"] = "causal_lm"
    architecture: dict[str, Any] | None = None
    """A decoder from scratch: model_type and the sizes of its config, such as {model_type: llama, hidden_size: 64}."""
    pretrained: str | None = None
    """Folder or Hugging Face id of a pretrained decoder (safetensors; code that a model brings along is never run)."""
    lora: LoRAConfig | None = None
    """Train low-rank adapters and freeze the backbone; null trains all of it."""
    gradient_checkpointing: bool = False
    """Save memory by computing the backbone's hidden states twice."""

    @model_validator(mode="after")
    def _one_backbone(self) -> Self:
        if (self.architecture is None) == (self.pretrained is None):
            raise ValueError("causal_lm needs either architecture or pretrained")
        return self


class ESASRecConfig(PositionsConfig):
    """Sizes of an eSASRec transformer (Tikhonovich et al. 2025): LiGR blocks; train it with a sampled softmax."""

    type: Literal["esasrec"] = "esasrec"


class HSTUConfig(TransformerConfig):
    """Sizes of an HSTU (Zhai et al. 2024)."""

    type: Literal["hstu"] = "hstu"
    attention_dropout: float | None = Field(None, ge=0, lt=1)
    """Dropout on attention weights; none when not given, as in the paper's code."""
    time_bias: bool = True
    """Add a learnt bias for the time from an event to the next one or query, where the log has times."""


class GRU4RecConfig(SequenceModelConfig):
    """Sizes of a GRU4Rec (Hidasi et al. 2016)."""

    type: Literal["gru4rec"] = "gru4rec"
    num_blocks: int = Field(1, ge=1)
    """GRU layers."""
    gru_dim: int | None = Field(None, ge=1)
    """Width of the GRU layers; hidden_dim when not given."""
