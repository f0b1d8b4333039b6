"""Negatives of a step: a pure function of (seed, epoch, step), the same on every worker.

Shapes: T tokens of this worker, G tokens of the global batch, N negatives.
"""

import torch
from torch import Tensor


class Negatives:
    """Uniform draws over the catalogue for one step.

    What a token is paired with depends on its place in the global batch (token_T), not on the worker that holds it.
    """

    def __init__(self, key: tuple[int, int, int], num_items: int, token_T: Tensor, global_tokens: int) -> None:
        seed, epoch, step = key
        mixed = (seed * 1_000_003 + epoch) * 1_000_003 + step
        self._generator = torch.Generator().manual_seed(mixed % 2**63)
        self._num_items = num_items
        self._token_T, self._global_tokens = token_T, global_tokens

    def shared(self, count: int) -> Tensor:
        """item_N that all tokens of the step share."""
        return self._draw((count,)).to(self._token_T.device)

    def per_token(self, count: int) -> Tensor:
        """item_TN, drawn for each token of the global batch."""
        drawn_GN = self._draw((self._global_tokens, count)).to(self._token_T.device)
        return drawn_GN[self._token_T]

    def _draw(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(1, self._num_items + 1, shape, generator=self._generator)
