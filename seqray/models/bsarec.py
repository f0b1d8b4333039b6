"""BSARec: causal attention mixed with a low-pass filter over the history (Shin et al., An Attentive Inductive Bias for
Sequential Recommendation beyond the Self-Attention, AAAI 2024).

The filter sees the whole history, so only the newest event can be asked for, and the last block works for it alone.
Shapes: T packed events, B sequences, L max_length, W longest of the batch, K real frequencies, D hidden, H heads,
d = D / H; X stands for T or B.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.model_sections import BSARecConfig
from seqray.models.dropout import Dropout
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.models.stream import Stream
from seqray.sequences import Batch


class BSARec(nn.Module):
    """The Fourier transform is that of max_length events, with zeros in front of a shorter history.

    The authors' code has position embeddings and attention at the padding too; here padding takes no part in anything.
    """

    Config = BSARecConfig
    causal = False

    def __init__(self, config: BSARecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_dim)
        self.norm, self.dropout = nn.LayerNorm(config.hidden_dim, eps=1e-12), Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        waves_LK = low_frequencies(config.max_length, config.frequencies)
        self.register_buffer("waves_LK", waves_LK.float(), persistent=False)
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after the newest event of each sequence."""
        places = Places(batch.lengths_B, cast(Tensor, self.waves_LK))
        hidden_TD = self.events(self.items(batch.items_T), batch) + self.position_embedding(places.stream.age_T)
        hidden_TD = self.dropout(self.norm(hidden_TD))
        *blocks, last = self.blocks
        for block in blocks:
            hidden_TD = block(hidden_TD, places)
        hidden_BD = last(hidden_TD, places, newest=True)
        return self.items.question(hidden_BD.index_select(0, places.row_T[batch.asked_P]))


def low_frequencies(length: int, count: int) -> Tensor:
    """waves_LK in float64, orthonormal: the constant and the count // 2 slowest pairs of cosine and sine.

    `waves @ waves.T` keeps what a Fourier transform of `length` has in its `count` lowest frequencies of both signs.
    """
    turns_L = torch.arange(length, dtype=torch.float64) * (2 * math.pi / length)
    waves = [torch.full_like(turns_L, length**-0.5)]
    for frequency in range(1, min(count // 2, length // 2) + 1):
        if 2 * frequency == length:  # the sine is zero everywhere
            waves.append((turns_L * frequency).cos() * length**-0.5)
        else:
            waves += [wave * (2 / length) ** 0.5 for wave in ((turns_L * frequency).cos(), (turns_L * frequency).sin())]
    return torch.stack(waves, 1)


class Places:
    """Where packed events stand among the sequences, and the low-pass filter over them."""

    def __init__(self, lengths_B: Tensor, waves_LK: Tensor) -> None:
        self.stream = Stream(lengths_B)
        self.last_B = lengths_B.cumsum(0) - 1
        self.B, self.W = len(lengths_B), int(lengths_B.max())
        self.row_T = torch.repeat_interleave(
            torch.arange(self.B, device=lengths_B.device), lengths_B, output_size=self.stream.T
        )
        # The newest event stands in the last column, as in the padded sequence; columns of padding alone are left out.
        self._cell_T = self.row_T * self.W + (self.W - 1 - self.stream.age_T)
        self._waves_WK = waves_LK[len(waves_LK) - self.W :]

    def pad(self, packed_TX: Tensor, fill: float = 0) -> Tensor:
        """(T, X) -> (B, W, X)."""
        flat = packed_TX.new_full((self.B * self.W, packed_TX.shape[1]), fill)
        return flat.index_copy(0, self._cell_T, packed_TX).view(self.B, self.W, -1)

    def pack(self, padded_BWX: Tensor) -> Tensor:
        """(B, W, X) -> (T, X)."""
        return padded_BWX.flatten(0, 1).index_select(0, self._cell_T)

    def total(self, packed_TX: Tensor) -> Tensor:
        """(T, X) -> (B, X), summed over each sequence."""
        return packed_TX.new_zeros(self.B, packed_TX.shape[1]).index_add(0, self.row_T, packed_TX)

    def low_pass(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (T, D): the slow part of each sequence."""
        waves_WK = self._waves_WK.to(hidden_TD.dtype)
        spectrum_BKD = waves_WK.T @ self.pad(hidden_TD)
        return self.pack(waves_WK @ spectrum_BKD)

    def newest_low_pass(self, hidden_TD: Tensor) -> Tensor:
        """(T, D) -> (B, D): `low_pass` at the newest event."""
        share_W = self._waves_WK @ self._waves_WK[-1]
        return self.total(share_W[self.W - 1 - self.stream.age_T].unsqueeze(1).to(hidden_TD.dtype) * hidden_TD)


class Block(nn.Module):
    """alpha x filter + (1 - alpha) x attention, then feed-forward; each is added to its input and then normed."""

    def __init__(self, config: BSARecConfig) -> None:
        super().__init__()
        D = config.hidden_dim
        self.alpha, self.num_heads = config.alpha, config.num_heads
        self.sqrt_beta_D = nn.Parameter(torch.randn(D))
        self.query, self.key_value, self.out = nn.Linear(D, D), nn.Linear(D, 2 * D), nn.Linear(D, D)
        self.expand, self.contract = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.filter_norm, self.attention_norm, self.feedforward_norm = (nn.LayerNorm(D, eps=1e-12) for _ in range(3))
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_rate)

    def forward(self, hidden_TD: Tensor, places: Places, newest: bool = False) -> Tensor:
        """(T, D) for all packed events, or (B, D) for the newest one of each sequence alone."""
        if newest:
            return self._newest(hidden_TD, places)
        qkv_TD3 = torch.cat([self.query(hidden_TD), self.key_value(hidden_TD)], 1)
        attended_TD = places.stream.attend(qkv_TD3, self.num_heads, self.attention_dropout)
        return self._combine(hidden_TD, places.low_pass(hidden_TD), attended_TD)

    def _newest(self, hidden_TD: Tensor, places: Places) -> Tensor:
        newest_BD = hidden_TD.index_select(0, places.last_B)
        attended_BD = self._attend_from(newest_BD, hidden_TD, places)
        return self._combine(newest_BD, places.newest_low_pass(hidden_TD), attended_BD)

    def _attend_from(self, newest_BD: Tensor, hidden_TD: Tensor, places: Places) -> Tensor:
        """Attention of each newest event over its sequence."""
        key_THd, value_THd = self.key_value(hidden_TD).unflatten(1, (2, self.num_heads, -1)).unbind(1)
        query_BHd = self.query(newest_BD).unflatten(1, (self.num_heads, -1)) * key_THd.shape[2] ** -0.5
        score_TH = (query_BHd.index_select(0, places.row_T) * key_THd).sum(2)
        share_TH = places.pack(places.pad(score_TH, float("-inf")).softmax(1))
        return places.total((self.attention_dropout(share_TH).unsqueeze(2) * value_THd).flatten(1))

    def _combine(self, hidden_XD: Tensor, low_XD: Tensor, attended_XD: Tensor) -> Tensor:
        """Filter and attention mixed, then feed-forward; beta scales the fast part, which the slow part leaves."""
        beta_D = self.sqrt_beta_D.square()
        filtered_XD = low_XD + beta_D * (hidden_XD - low_XD)
        filtered_XD = self.filter_norm(hidden_XD + self.dropout(filtered_XD))
        attended_XD = self.attention_norm(hidden_XD + self.dropout(self.out(attended_XD)))
        mixed_XD = self.alpha * filtered_XD + (1 - self.alpha) * attended_XD
        inner = self.dropout(self.contract(F.gelu(self.expand(mixed_XD))))
        return cast(Tensor, self.feedforward_norm(mixed_XD + inner))
