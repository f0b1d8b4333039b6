"""Causal softmax attention over packed events by our kernel: no padding at all. Shapes: T events, D hidden, H heads."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqray.models.dropout import Dropout
from seqray.native.library import operators_of_training


def packed_attention(qkv_TD3: Tensor, lengths_B: Tensor, num_heads: int, dropout: Dropout) -> Tensor | None:
    """(T, 3D) -> (T, D), softmax in float32, products in the input's type; None where the kernel is not at hand.

    The mask of dropout follows from a draw of PyTorch's generator, the two events and the head alone, so that it does
    not depend on the number of threads.
    """
    narrow = qkv_TD3.dtype == torch.bfloat16 and qkv_TD3.shape[1] // (3 * num_heads) % 2 == 0
    training = torch.is_grad_enabled() and qkv_TD3.requires_grad
    if not (narrow or qkv_TD3.dtype == torch.float32) or operators_of_training(build=training) is None:
        return None
    rate = dropout.rate if dropout.training else 0.0
    seed = int(torch.randint(2**62, (1,))) if rate else 0
    return cast(Tensor, _Attention.apply(qkv_TD3, lengths_B, num_heads, rate, seed))  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TD3: Tensor, *settings: Any) -> Tensor:
        kernels = operators_of_training(build=False)
        assert kernels is not None
        qkv_TD3 = qkv_TD3.contiguous()
        mixed_TD, log_sums_HT = kernels.attention(qkv_TD3, *settings)
        ctx.save_for_backward(qkv_TD3, log_sums_HT)
        ctx.kernel, ctx.settings = kernels.attention_backward, settings
        return cast(Tensor, mixed_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_TD: Tensor) -> tuple[Tensor | None, ...]:
        slope_TD3 = ctx.kernel(slope_TD.contiguous(), *ctx.saved_tensors, *ctx.settings)
        return slope_TD3, None, None, None, None
