"""Grid: packed events in a padded (B, L) rectangle, for what cannot work on packed ones.

Shapes: B sequences, L longest of the batch, T packed events, D hidden.
"""

import torch
from torch import Tensor


class Grid:
    """Where packed events stand in the rectangle, first event in column 0.

    Padding only comes after a sequence's events, so a causal mask alone keeps it out of every real position.
    """

    def __init__(self, lengths_B: Tensor) -> None:
        self.B, self.L = len(lengths_B), int(lengths_B.max())
        ends_B = lengths_B.cumsum(0)
        row_T = torch.repeat_interleave(torch.arange(self.B, device=lengths_B.device), lengths_B)
        place_T = torch.arange(len(row_T), device=lengths_B.device) - (ends_B - lengths_B)[row_T]
        self._cell_T = row_T * self.L + place_T
        self._full = len(row_T) == self.B * self.L

    def pad(self, packed_TD: Tensor) -> Tensor:
        """(T, D) -> (B, L, D)."""
        if self._full:
            return packed_TD.view(self.B, self.L, -1)
        flat = packed_TD.new_zeros(self.B * self.L, packed_TD.shape[1]).index_copy(0, self._cell_T, packed_TD)
        return flat.view(self.B, self.L, -1)

    def pack(self, padded_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (T, D)."""
        flat = padded_BLD.reshape(self.B * self.L, -1)
        return flat if self._full else flat.index_select(0, self._cell_T)
