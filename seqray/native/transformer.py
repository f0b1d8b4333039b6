"""A causal transformer in float32 on a CPU for weights that change no more, by our kernel.

Shapes: T packed events, B histories, D hidden, V items + padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from seqray.native.library import operators


class TransformerBlock(Protocol):
    """x + out(attention(qkv(norm(x)))), then x + contract(gelu(expand(norm(x))))."""

    num_heads: int
    attention_norm: nn.LayerNorm
    qkv: nn.Linear
    out: nn.Linear
    feedforward_norm: nn.LayerNorm
    expand: nn.Linear
    contract: nn.Linear


@dataclass(frozen=True)
class Transformer:
    """What goes into the blocks, the blocks, and the last norm: tensors on a CPU in float32."""

    table_VD: Tensor
    """The items' vectors, before they are multiplied by `scale`."""
    scale: float
    positions_LD: Tensor
    from_newest: bool
    """Whether the first position is the newest event's."""
    blocks: Sequence[TransformerBlock]
    norm: nn.LayerNorm
    normalize: bool = False
    """Whether the hidden states are L2-normalised."""
    temperature: float = 1.0
    """What they are divided by then."""


class TransformerKernel:
    """Runs a Transformer; its weights are turned once, and later changes of them do not count."""

    def __init__(self, kernels: Any, model: Transformer) -> None:
        self._kernel = kernels.transformer
        weights = [tensor for block in model.blocks for tensor in _weights(block)] + _norm(model.norm)
        self.settings = (
            model.table_VD.contiguous(), model.scale, model.positions_LD.contiguous(), model.from_newest,
            [tensor.detach() for tensor in weights], model.blocks[0].num_heads, model.norm.eps,
            model.normalize, model.temperature,
        )  # fmt: skip
        """As the kernels want them."""

    @classmethod
    def of(cls, model: Transformer, build: bool) -> "TransformerKernel | None":
        """None where the kernels are not at hand; they are compiled only if `build`."""
        fits = model.table_VD.device.type == "cpu" and model.table_VD.dtype == torch.float32
        kernels = operators(build) if fits else None
        return None if kernels is None else cls(kernels, model)

    def __call__(self, items_T: Tensor, lengths_B: Tensor, added_TD: Tensor | None = None) -> Tensor:
        """hidden_BD after the newest event of each history; the same whatever else is in the batch.

        added_TD: what is added to the vectors of the events. The interpreter's lock is given away meanwhile.
        """
        return cast(Tensor, self._kernel(items_T, lengths_B, added_TD, *self.settings))


def _weights(block: TransformerBlock) -> list[Tensor]:
    attention = [*_norm(block.attention_norm), *_layer(block.qkv), *_layer(block.out)]
    return [*attention, *_norm(block.feedforward_norm), *_layer(block.expand), *_layer(block.contract)]


def _norm(norm: nn.LayerNorm) -> list[Tensor]:
    return [norm.weight.clone(), norm.bias.clone()]


def _layer(layer: nn.Linear) -> list[Tensor]:
    return [layer.weight.t().clone(memory_format=torch.contiguous_format), layer.bias.clone()]
