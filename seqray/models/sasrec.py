"""SASRec: a causal transformer over the history (Kang and McAuley, Self-Attentive Sequential Recommendation, 2018).

Pre-norm blocks (x + attention(norm(x)), x + feed_forward(norm(x))) and a last norm; item embedding shared with the
output. Shapes: B sequences, L longest of the batch, T packed tokens, D hidden, H heads, V items + padding.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.sections import SASRecConfig
from seqray.sequences import Batch


class SASRec(nn.Module):
    """Everything but the attention works on packed tokens; only the attention sees a padded (B, L) grid."""

    Config = SASRecConfig

    def __init__(self, config: SASRecConfig, num_items: int) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.item_embedding = nn.Embedding(num_items + 1, config.hidden_dim, padding_idx=0)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.apply(_initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.item_embedding.weight

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state of each event, from it and the events before it."""
        grid = Grid(batch.lengths_B)
        hidden_TD = self.item_embedding(batch.items_T) * self.item_embedding.embedding_dim**0.5
        hidden_TD = self.dropout(hidden_TD + self.position_embedding(grid.age_T))
        for block in self.blocks:
            hidden_TD = block(hidden_TD, grid)
        return cast(Tensor, self.norm(hidden_TD))


class Grid:
    """Where packed tokens stand in a padded (B, L) grid, first event in column 0.

    Padding only comes after a sequence's events, so the causal mask alone keeps it out of every real position.
    """

    def __init__(self, lengths_B: Tensor) -> None:
        self.B, self.L = len(lengths_B), int(lengths_B.max())
        ends_B = lengths_B.cumsum(0)
        row_T = torch.repeat_interleave(torch.arange(self.B, device=lengths_B.device), lengths_B)
        token_T = torch.arange(len(row_T), device=lengths_B.device)
        self.age_T = ends_B[row_T] - 1 - token_T
        """Events that came after: 0 for the newest, so that the newest has the same position in all histories."""
        self._cell_T = row_T * self.L + token_T - (ends_B - lengths_B)[row_T]
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


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added to what came in."""

    def __init__(self, config: SASRecConfig) -> None:
        super().__init__()
        D, inner = config.hidden_dim, config.feedforward_dim or 4 * config.hidden_dim
        self.num_heads, self.dropout_rate = config.num_heads, config.dropout
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.expand, self.contract = nn.Linear(D, inner), nn.Linear(inner, D)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden_TD: Tensor, grid: Grid) -> Tensor:
        """One block over packed tokens."""
        hidden_TD = hidden_TD + self.dropout(self._attend(self.attention_norm(hidden_TD), grid))
        inner = F.gelu(self.expand(self.feedforward_norm(hidden_TD)))
        return hidden_TD + cast(Tensor, self.dropout(self.contract(inner)))

    def _attend(self, hidden_TD: Tensor, grid: Grid) -> Tensor:
        q, k, v = grid.pad(self.qkv(hidden_TD)).view(grid.B, grid.L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        return cast(Tensor, self.out(grid.pack(mixed.transpose(1, 2).reshape(grid.B, grid.L, -1))))


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
