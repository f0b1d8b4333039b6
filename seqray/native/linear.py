"""A linear layer with what stands before and after it, by our kernel where bf16 is wanted on a CPU.

Shapes: T rows, I inputs, O outputs.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from seqray.models.dropout import Dropout
from seqray.native.library import operators_of_training

NOTHING, NORM, GELU = range(3)
"""What the kernel does to the input first."""


def linear(
    input_TI: Tensor, layer: nn.Linear, *, norm: nn.LayerNorm | None = None, gelu: bool = False,
    residual_TO: Tensor | None = None, dropout: Dropout | None = None,
) -> Tensor:  # fmt: skip
    """(T, I) -> (T, O): the layer over the input, normed or through GELU first; `dropout` and added to the residual.

    Under bf16 autocast on a CPU it is one kernel, which rounds as autocast does; the mask of dropout then depends on a
    draw of PyTorch's generator and an element's place alone.
    """
    bare = norm is not None and norm.bias is None
    if bare or layer.weight.dtype != torch.float32 or bf16_kernels(input_TI) is None:
        prepared = F.gelu(input_TI) if gelu else input_TI if norm is None else norm(input_TI)
        output_TO = layer(prepared) if dropout is None else dropout(layer(prepared))
        return cast(Tensor, output_TO if residual_TO is None else residual_TO + output_TO)
    rate = dropout.rate if dropout is not None and dropout.training else 0.0
    seed = int(torch.randint(2**62, (1,))) if rate else 0
    scale, shift, epsilon = (None, None, 0.0) if norm is None else (norm.weight, norm.bias, norm.eps)
    first = GELU if gelu else NOTHING if norm is None else NORM
    return cast(Tensor, _Linear.apply(  # type: ignore[no-untyped-call]
        input_TI, residual_TO, layer.weight, layer.bias, scale, shift, first, epsilon, rate, seed
    ))  # fmt: skip


def bf16_kernels(like: Tensor) -> Any | None:
    """The kernels where autocast to bf16 is on for a CPU."""
    if like.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or like.dtype == torch.float64:
        return None
    return (
        operators_of_training(build=torch.is_grad_enabled())
        if torch.get_autocast_dtype("cpu") == torch.bfloat16
        else None
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input_TI: Tensor, residual_TO: Tensor | None, weight_OI: Tensor, bias_O: Tensor | None,
        scale_I: Tensor | None, shift_I: Tensor | None, first: int, epsilon: float, rate: float, seed: int,
    ) -> Tensor:  # fmt: skip
        kernels = operators_of_training(build=False)
        assert kernels is not None
        input_TI = input_TI.contiguous()
        residual_TO = None if residual_TO is None else residual_TO.float().contiguous()
        ctx.save_for_backward(input_TI, weight_OI, scale_I, shift_I)
        ctx.kernel, ctx.settings = kernels.linear_backward, (epsilon, rate, seed)
        ctx.first = first
        return cast(Tensor, kernels.linear(
            input_TI, weight_OI, bias_O, first, scale_I, shift_I, epsilon, residual_TO, rate, seed
        ))  # fmt: skip

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope_TO: Tensor) -> tuple[Tensor | None, ...]:
        input_TI, weight_OI, scale_I, shift_I = ctx.saved_tensors
        of_input, of_weight, of_bias, of_scale, of_shift = ctx.kernel(
            slope_TO.contiguous(), input_TI, weight_OI, ctx.first, scale_I, shift_I, *ctx.settings
        )
        slopes = (of_input, slope_TO, of_weight, of_bias, of_scale, of_shift)
        return *(slope if wanted else None for slope, wanted in zip(slopes, ctx.needs_input_grad, strict=False)), *(
            None,
        ) * 4
