"""What losses, evaluation and serving know of a model, whoever wrote it."""

from typing import Any, Protocol, cast, runtime_checkable

from torch import Tensor, nn

from seqray.component import component_class
from seqray.errors import ConfigError
from seqray.sections import Component
from seqray.sequences import Batch


@runtime_checkable
class SequentialModel(Protocol):
    """Scores are `hidden @ weights.T`: a hidden state for each event, a weight vector for each item.

    A model is an `nn.Module` built as `Model(config, num_items)`, single-device code, with its section as `Config`
    and `max_length` events of history that it can see.
    """

    Config: type[Component]
    max_length: int

    def encode(self, batch: Batch) -> Tensor:
        """hidden_TD of the real events of packed sequences, none longer than max_length; causal."""
        ...

    def item_weights(self) -> Tensor:
        """weights_VD; V is num_items + 1 and row 0 is padding."""
        ...


class Module(nn.Module, SequentialModel):
    """For annotations: an nn.Module with the form of a SequentialModel."""


def build_model(config: Component, num_items: int) -> Module:
    """The model that `config.type` names; ConfigError when its class lacks the form."""
    model: Any = component_class("model", config.type)(config, num_items)
    if not (isinstance(model, nn.Module) and isinstance(model, SequentialModel)):
        raise ConfigError(
            f"model.type: {config.type!r} is not an nn.Module with Config, max_length, encode, item_weights"
        )
    return cast(Module, model)
