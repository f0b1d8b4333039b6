"""What losses, evaluation and serving know of a model, whoever wrote it.

Shapes: T packed events, P asked events, B sequences, D hidden, V items + padding, M pairs (asked event, item).
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from seqray.catalogue import Catalogue
from seqray.component import component_class
from seqray.errors import ConfigError
from seqray.sections import Component
from seqray.sequences import Batch


@runtime_checkable
class SequentialModel(Protocol):
    """Scores are `hidden @ weights.T`: a hidden state for each asked event, a weight vector for each item.

    A model is an `nn.Module` built as `Model(config, catalogue)`, single-device code, with its section as `Config`
    and `max_length` events of history that it can see. Six things are optional:

    - `causal = False`: it reads whole sequences, so only the newest event of each can be asked for.
    - `training_view(step, draws) -> Step`: it is trained on something else than the next events (BERT4Rec's masks).
    - parts of an `nn.ModuleList` are blocks: called, once in a pass, and never asked for their insides, so that
      train.activation_checkpointing and FSDP can take them one by one.
    - `kernels = True`: its linear layers go through `seqray.native.linear`, so that bf16 pays on a CPU at any width.
    - `history_scores(batch, hidden_PD) -> HistoryScores`: it adds to the scores of items of the history.
    - `prepared(build_kernels) -> SequentialModel | None`: the same model, quicker, for weights that change no more.
    """

    Config: type[Component]
    max_length: int

    def encode(self, batch: Batch) -> Tensor:
        """hidden_PD after the asked events (`batch.asked`) of packed sequences, none longer than max_length.

        In a causal model what comes after an event has no part in its hidden state.
        """
        ...

    def item_weights(self) -> Tensor:
        """weights_VD; V is num_items + 1 and row 0 is padding."""
        ...


class Module(nn.Module, SequentialModel):
    """For annotations: an nn.Module with the form of a SequentialModel."""


@dataclass(frozen=True)
class HistoryScores:
    """Scores that are added for items of the history: each pair (row, item) once, rows ascending.

    rows_M: asked event; items_M: item_index, ascending within a row; values_M: float32, what is added.
    """

    rows_M: Tensor
    items_M: Tensor
    values_M: Tensor


@dataclass(frozen=True)
class Prediction:
    """Scores of all items after each asked event, not yet multiplied out."""

    hidden_PD: Tensor
    weights_VD: Tensor
    added: HistoryScores | None = None

    def scores(self) -> Tensor:
        """scores_PV in float32, a new tensor."""
        scores_PV = self.hidden_PD.float() @ self.weights_VD.float().T
        if self.added is not None:
            scores_PV.index_put_((self.added.rows_M, self.added.items_M), self.added.values_M.float(), accumulate=True)
        return scores_PV

    def scores_of(self, items_C: Tensor) -> Tensor:
        """scores_PC of some items, each once, in float32."""
        scores_PC = self.hidden_PD.float() @ self.weights_VD[items_C].float().T
        if self.added is not None:
            column_V = items_C.new_full((len(self.weights_VD),), -1)
            column_V[items_C] = torch.arange(len(items_C), device=items_C.device)
            column_M = column_V[self.added.items_M]
            wanted = column_M >= 0
            places = (self.added.rows_M[wanted], column_M[wanted])
            scores_PC.index_put_(places, self.added.values_M[wanted].float(), accumulate=True)
        return scores_PC

    def row(self, row: int) -> "Prediction":
        """The prediction after one of the asked events."""
        if self.added is None:
            return Prediction(self.hidden_PD[row : row + 1], self.weights_VD)
        start, stop = torch.searchsorted(self.added.rows_M, self.added.rows_M.new_tensor([row, row + 1])).tolist()
        rows_M, items_M, values_M = (
            part[start:stop] for part in (self.added.rows_M, self.added.items_M, self.added.values_M)
        )
        return Prediction(
            self.hidden_PD[row : row + 1], self.weights_VD, HistoryScores(rows_M - row, items_M, values_M)
        )


def predict(model: SequentialModel, batch: Batch, weights_VD: Tensor | None = None) -> Prediction:
    """What `model` says after the asked events; `weights_VD` are its item weights where they are at hand."""
    hidden_PD = model.encode(batch)
    history_scores = getattr(model, "history_scores", None)
    added = history_scores(batch, hidden_PD) if history_scores else None
    return Prediction(hidden_PD, model.item_weights() if weights_VD is None else weights_VD, added)


def prepare(model: SequentialModel, build_kernels: bool = False) -> SequentialModel:
    """The model for weights that change no more; build_kernels: compile what it can use if it is not there yet."""
    prepared = getattr(model, "prepared", None)
    found: SequentialModel | None = prepared(build_kernels) if prepared else None
    return model if found is None else found


def is_causal(model: SequentialModel) -> bool:
    """Whether every event of a sequence can be asked for."""
    return bool(getattr(model, "causal", True))


def build_model(config: Component, catalogue: Catalogue) -> Module:
    """The model that `config.type` names; ConfigError when its class lacks the form."""
    model: Any = component_class("model", config.type)(config, catalogue)
    if not (isinstance(model, nn.Module) and isinstance(model, SequentialModel)):
        raise ConfigError(
            f"model.type: {config.type!r} is not an nn.Module with Config, max_length, encode, item_weights"
        )
    return cast(Module, model)
