"""The blocks of a model: what activation checkpointing computes again, and FSDP gathers one at a time."""

from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from seqray.errors import ConfigError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The parts of the outermost `nn.ModuleList`s, in order; lists of embeddings are tables and no blocks."""

    def found(module: nn.Module) -> Iterator[nn.Module]:
        for child in module.children():
            if isinstance(child, nn.ModuleList) and not any(isinstance(part, nn.Embedding) for part in child):
                yield from child
            else:
                yield from found(child)

    return list(found(model))


def checkpoint_blocks(model: nn.Module) -> None:
    """Lets each block keep what goes into it alone and compute the rest again when the backward pass gets there.

    Dropout draws the same masks again: their seeds come from PyTorch's generator, whose state is put back. ConfigError
    when the model has no blocks.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise ConfigError("train.activation_checkpointing: this model has no blocks (parts of an nn.ModuleList)")
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
