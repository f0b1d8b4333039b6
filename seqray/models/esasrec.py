"""eSASRec's transformer (Tikhonovich et al., eSASRec, 2025): SASRec with the blocks of LiGR (Borisyuk et al. 2025).

A block is x + attention(norm(x)) * sigmoid(gate(x)), then the same with a SwiGLU feed-forward (Shazeer 2020); a last
norm as in SASRec. Everything works on packed events. Shapes: T packed events, P asked events, D hidden, V items +
padding.
"""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.model_sections import ESASRecConfig
from seqray.models.dropout import Dropout
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.models.stream import Stream
from seqray.sequences import Batch


class ESASRec(nn.Module):
    """Positions count from the newest event, so that the newest has the same position in all histories."""

    Config = ESASRecConfig

    def __init__(self, config: ESASRecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(LiGRBlock(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self._scale = config.hidden_dim**0.5
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after each asked event, from it and the events before it."""
        stream = Stream(batch.lengths_B)
        hidden_TD = self.events(self.items(batch.items_T) * self._scale, batch)
        hidden_TD = self.dropout(hidden_TD + self.position_embedding(stream.age_T))
        for block in self.blocks:
            hidden_TD = block(hidden_TD, stream)
        return self.items.question(self.norm(batch.asked(hidden_TD)))


class LiGRBlock(nn.Module):
    """Attention and SwiGLU, each normed before, gated by what came in, and added to it."""

    def __init__(self, config: ESASRecConfig) -> None:
        super().__init__()
        D, inner = config.hidden_dim, config.feedforward_dim or 4 * config.hidden_dim
        self.num_heads = config.num_heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention_gate, self.feedforward_gate = nn.Linear(D, D), nn.Linear(D, D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.switch, self.expand = nn.Linear(D, inner, bias=False), nn.Linear(D, inner, bias=False)
        self.contract = nn.Linear(inner, D, bias=False)
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(
            config.dropout if config.attention_dropout is None else config.attention_dropout
        )

    def forward(self, hidden_TD: Tensor, stream: Stream) -> Tensor:
        """One block over packed events."""
        mixed_TD = stream.attend(self.qkv(self.attention_norm(hidden_TD)), self.num_heads, self.attention_dropout)
        gate_TD = torch.sigmoid(self.attention_gate(hidden_TD))
        hidden_TD = hidden_TD + self.dropout(self.out(mixed_TD)) * gate_TD
        normed_TD = self.feedforward_norm(hidden_TD)
        inner = self.dropout(F.silu(self.switch(normed_TD)) * self.expand(normed_TD))
        gate_TD = torch.sigmoid(self.feedforward_gate(hidden_TD))
        return hidden_TD + cast(Tensor, self.dropout(self.contract(inner)) * gate_TD)
