"""The optimizer and its learning rate as a pure function of the step."""

import math
from typing import Literal

import torch
from torch import nn

from seqray.program_config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Adam when weight_decay is 0), fused, over the weights that are not frozen.

    Weights that lie on the workers in different ways cannot be in one fused step, so they are groups of their own.
    """
    kinds: dict[type, list[nn.Parameter]] = {}
    for weight in model.parameters():
        if weight.requires_grad:
            kinds.setdefault(type(weight.data), []).append(weight)
    groups = [{"params": weights} for weights in kinds.values()]
    return torch.optim.AdamW(groups, config.learning_rate, config.betas, weight_decay=config.weight_decay, fused=True)


def learning_rate(
    step: int, total_steps: int, peak: float, warmup_steps: int, schedule: Literal["constant", "linear", "cosine"]
) -> float:
    """Rate of optimizer step `step`, from 0: linear warm-up to `peak`, then constant or down to 0 at total_steps."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * (1 - share if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share)))
