"""The base of all configuration sections, and the sections of the built-in components.

A component's class says `Config = SASRecConfig`; the sections stand here, away from the classes, so that a mistake
in a config is answered before PyTorch is imported.
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A frozen part of the configuration tree; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Component(Section):
    """The section of a part that can be exchanged: `type` is a short name or `module:attribute`."""

    type: str
    """A built-in short name, or `module:attribute` of a class with a nested `Config` that derives from Component."""


class SASRecConfig(Component):
    """Sizes of a SASRec transformer (Kang and McAuley 2018)."""

    type: Literal["sasrec"] = "sasrec"
    hidden_dim: int = Field(64, ge=1)
    """Width of the hidden states and of the item embedding."""
    num_blocks: int = Field(2, ge=1)
    """Transformer blocks."""
    num_heads: int = Field(1, ge=1)
    """Attention heads; must divide hidden_dim."""
    feedforward_dim: int | None = Field(None, ge=1)
    """Width inside the feed-forward layer; 4 x hidden_dim when not given."""
    dropout: float = Field(0.2, ge=0, lt=1)
    """Dropout on embeddings, attention weights and both branches of a block."""
    max_length: int = Field(50, ge=1)
    """Events of the history that the model sees, the newest ones."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_dim % self.num_heads:
            raise ValueError(f"hidden_dim {self.hidden_dim} is not a multiple of num_heads {self.num_heads}")
        return self


class SoftmaxConfig(Component):
    """Full cross-entropy over the catalogue."""

    type: Literal["softmax"] = "softmax"
    chunk_elements: int = Field(4_194_304, ge=1)
    """Logits held at a time; above it the loss goes over the tokens in chunks and keeps no logit tensor."""


class SampledSoftmaxConfig(Component):
    """Cross-entropy over the target and uniform negatives that all positions of a step share."""

    type: Literal["sampled_softmax"] = "sampled_softmax"
    num_negatives: int = Field(1024, ge=1)
    """Negatives drawn for each step."""


class BCEConfig(Component):
    """Binary cross-entropy of the target against negatives drawn for each position (SASRec's own loss)."""

    type: Literal["bce"] = "bce"
    num_negatives: int = Field(1, ge=1)
    """Negatives drawn for each position."""
