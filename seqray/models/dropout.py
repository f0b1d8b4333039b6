"""Dropout whose mask costs little on a CPU: a fast generator, one draw of 64 bits for four elements."""

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Module):
    """Inverted dropout; on a CPU the rate is a multiple of 1/65536."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, values: Tensor) -> Tensor:
        """The values, or in training with a share of `rate` of them 0 and the others scaled up."""
        if not self.training or self.rate == 0:
            return values
        if values.device.type != "cpu":
            return F.dropout(values, self.rate)
        return values * self.mask(values)

    def mask(self, values: Tensor) -> Tensor:
        """What training multiplies the values by: 0 for a share of `rate` of them, else 1 / (1 - rate)."""
        if values.device.type != "cpu":
            return F.dropout(torch.ones_like(values), self.rate)
        kept = _keep(values.numel(), self.rate).view(values.shape)
        return kept.to(values.dtype).mul_(1 / (1 - self.rate))


def _keep(count: int, rate: float) -> Tensor:
    """Whether each of `count` elements stays; PyTorch's own generator only gives the seed."""
    generator = np.random.SFC64(int(torch.randint(2**62, (1,))))
    draws = generator.random_raw((count + 3) // 4).view(np.int16)[:count]
    return torch.from_numpy(draws >= round(rate * 65536) - 32768)
