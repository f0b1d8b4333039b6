"""eSASRec's transformer (Tikhonovich et al., eSASRec, 2025): SASRec with the blocks of LiGR (Borisyuk et al. 2025).

A block is x + attention(norm(x)) * sigmoid(gate(x)), then the same with a SwiGLU feed-forward (Shazeer 2020); a last
norm as in SASRec. Everything works on packed events. Shapes: T packed events, D hidden.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.model_sections import ESASRecConfig, PositionsConfig
from seqray.models.dropout import Dropout
from seqray.models.sasrec import SASRec
from seqray.models.stream import Stream
from seqray.native.linear import linear


class ESASRec(SASRec):
    """SASRec with other blocks."""

    Config = ESASRecConfig

    @staticmethod
    def block(config: PositionsConfig) -> nn.Module:
        """A new block of the transformer."""
        return LiGRBlock(config)


class LiGRBlock(nn.Module):
    """Attention and SwiGLU, each normed before, gated by what came in, and added to it."""

    def __init__(self, config: PositionsConfig) -> None:
        super().__init__()
        D, inner = config.hidden_dim, config.feedforward_dim or 4 * config.hidden_dim
        self.num_heads = config.num_heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention_gate, self.feedforward_gate = nn.Linear(D, D), nn.Linear(D, D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.switch, self.expand = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.contract = nn.Linear(inner, D, bias=False)
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_rate)

    def forward(self, hidden_TD: Tensor, stream: Stream, asked_P: Tensor | None = None) -> Tensor:
        """One block over packed events; (P, D) of some of them alone when `asked_P` names these."""
        qkv_TD3 = linear(hidden_TD, self.qkv, norm=self.attention_norm)
        mixed_TD = stream.attend(qkv_TD3, self.num_heads, self.attention_dropout)
        if asked_P is not None:
            mixed_TD, hidden_TD = mixed_TD[asked_P], hidden_TD[asked_P]
        gate_TD = torch.sigmoid(linear(hidden_TD, self.attention_gate))
        hidden_TD = hidden_TD + linear(mixed_TD, self.out, dropout=self.dropout) * gate_TD
        switch = F.silu(linear(hidden_TD, self.switch, norm=self.feedforward_norm))
        inner = self.dropout(switch * linear(hidden_TD, self.expand, norm=self.feedforward_norm))
        gate_TD = torch.sigmoid(linear(hidden_TD, self.feedforward_gate))
        return hidden_TD + linear(inner, self.contract, dropout=self.dropout) * gate_TD
