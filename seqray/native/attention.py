"""Causal softmax attention over packed events by our kernel: no padding at all. Shapes: T events, D hidden, H heads."""

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqray.models.dropout import Dropout
from seqray.native.library import operators


def packed_attention(qkv_TD3: Tensor, lengths_B: Tensor, num_heads: int, dropout: Dropout) -> Tensor | None:
    """(T, 3D) -> (T, D), computed in float32; None where the kernel is not at hand.

    The mask of dropout follows from a draw of PyTorch's generator, an event and a head alone, so that it does not
    depend on the number of threads.
    """
    wide = torch.promote_types(qkv_TD3.dtype, torch.float32)
    training = torch.is_grad_enabled() and qkv_TD3.requires_grad
    if wide != torch.float32 or operators(build=training) is None:
        return None
    rate = dropout.rate if dropout.training else 0.0
    seed = int(torch.randint(2**62, (1,))) if rate else 0
    return cast(Tensor, _Attention.apply(qkv_TD3, lengths_B, num_heads, rate, seed))  # type: ignore[no-untyped-call]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_TD3: Tensor, *settings: Any) -> Tensor:
        kernels = operators(build=False)
        assert kernels is not None
        wide_TD3 = qkv_TD3.float().contiguous()
        mixed_TD, log_sums_HT = kernels.attention(wide_TD3, *settings)
        ctx.save_for_backward(wide_TD3, log_sums_HT)
        ctx.backward_kernel, ctx.settings = kernels.attention_backward, settings
        return cast(Tensor, mixed_TD.to(qkv_TD3.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_TD: Tensor) -> tuple[Tensor | None, ...]:
        slope_TD3 = ctx.backward_kernel(slope_TD.float().contiguous(), *ctx.saved_tensors, *ctx.settings)
        return slope_TD3.to(slope_TD.dtype), None, None, None, None
