"""The base of all configuration sections, and the sections of the losses (`seqray.model_sections` has the models').

A component's class says `Config = SoftmaxConfig`; the sections stand here, away from the classes, so that a mistake
in a config is answered before PyTorch is imported.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A frozen part of the configuration tree; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Component(Section):
    """The section of a part that can be exchanged: `type` is a short name or `module:attribute`."""

    type: str
    """A built-in short name, or `module:attribute` of a class with a nested `Config` that derives from Component."""


class SoftmaxConfig(Component):
    """Full cross-entropy over the catalogue."""

    type: Literal["softmax"] = "softmax"
    chunk_elements: int | None = Field(None, ge=1)
    """Logits held at a time; when not given 4 million on a CPU, 268 million on a GPU, and at least hidden_dim rows."""


class SampledSoftmaxConfig(Component):
    """Cross-entropy over the target and sampled negatives."""

    type: Literal["sampled_softmax"] = "sampled_softmax"
    num_negatives: int = Field(1024, ge=1)
    """Negatives of each target."""
    negatives: Literal["uniform", "popularity", "in_batch", "mixed"] = "uniform"
    """Where they come from; in_batch: the items of the worker's other targets, mixed: uniform and in-batch ones."""
    per: Literal["batch", "position"] = "batch"
    """Drawn once for all targets of a step, or for each; the latter costs much more."""
    log_q: bool | None = None
    """Lowers a negative's score by the log of its expected count; when not given, only for uniform ones not."""
    popularity_power: float = Field(1.0, ge=0)
    """Popularity draws an item with a chance proportional to its training events to this power."""
    uniform_share: float = Field(0.5, ge=0, le=1)
    """Share of uniform negatives among mixed ones."""
    chunk_elements: int | None = Field(None, ge=1)
    """Scores held at a time; when not given 4 million on a CPU, 268 million on a GPU."""


class BCEConfig(Component):
    """Binary cross-entropy of the target against uniform negatives (SASRec's own loss)."""

    type: Literal["bce"] = "bce"
    num_negatives: int = Field(1, ge=1)
    """Negatives of each target."""
    per: Literal["batch", "position"] = "position"
    """Drawn once for all targets of a step, or for each."""
    chunk_elements: int | None = Field(None, ge=1)
    """Numbers held at a time; when not given 4 million on a CPU, 268 million on a GPU."""


class GBCEConfig(Component):
    """Binary cross-entropy that is calibrated for the negatives it does not see (gSASRec)."""

    type: Literal["gbce"] = "gbce"
    num_negatives: int = Field(256, ge=1)
    """Negatives of each target."""
    t: float = Field(0.75, ge=0, le=1)
    """Calibration: 0 is plain binary cross-entropy, at 1 the scores stand for true chances."""
    per: Literal["batch", "position"] = "position"
    """Drawn once for all targets of a step, or for each as in the paper."""
    chunk_elements: int | None = Field(None, ge=1)
    """Numbers held at a time; when not given 4 million on a CPU, 268 million on a GPU."""
