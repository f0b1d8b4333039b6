"""SASRec: a causal transformer over the history (Kang and McAuley, Self-Attentive Sequential Recommendation, 2018).

Pre-norm blocks (x + attention(norm(x)), x + feed_forward(norm(x))) and a last norm; item embedding shared with the
output. Everything works on packed events. Shapes: T packed events, P asked events, D hidden, V items + padding.
"""

from typing import cast

import torch
from torch import Tensor, nn

from seqray.catalogue import Catalogue
from seqray.model_sections import FeedForwardConfig, PositionsConfig, SASRecConfig
from seqray.models.dropout import Dropout
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.models.stream import Stream
from seqray.native.linear import linear
from seqray.native.transformer import Transformer, TransformerBlock, TransformerKernel
from seqray.sections import Component
from seqray.sequences import Batch


class SASRec(nn.Module):
    """A causal transformer over packed events."""

    Config: type[Component] = SASRecConfig
    kernels = True

    def __init__(self, config: PositionsConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(self.block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self._scale, self._from_newest = config.hidden_dim**0.5, config.positions_from == "newest"
        self.apply(initialize)

    @staticmethod
    def block(config: PositionsConfig) -> nn.Module:
        """A new block of the transformer."""
        return Block(config)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after each asked event, from it and the events before it."""
        stream = Stream(batch.lengths_B)
        hidden_TD = self.events(self.items(batch.items_T) * self._scale, batch)
        position_T = stream.age_T if self._from_newest else stream.order_T
        hidden_TD = self.dropout(hidden_TD + self.position_embedding(position_T))
        *before, last = self.blocks
        for block in before:
            hidden_TD = block(hidden_TD, stream)
        if batch.asks_few:
            return self.items.question(self.norm(last(hidden_TD, stream, batch.asked_P)))
        return self.items.question(self.norm(batch.asked(last(hidden_TD, stream))))

    def prepared(self, build_kernels: bool) -> "PreparedSASRec | None":
        """See SequentialModel; None where there is no kernel for its blocks or on this machine."""
        if not all(type(block) is Block for block in self.blocks):
            return None
        blocks = [cast(TransformerBlock, block) for block in self.blocks]
        table_VD = self.items.vectors().detach()
        positions_LD = self.position_embedding.weight.detach()
        transformer = Transformer(
            table_VD, self._scale, positions_LD, self._from_newest, blocks, self.norm,
            self.items.normalize, self.items.temperature,
        )  # fmt: skip
        kernel = TransformerKernel.of(transformer, build_kernels)
        return None if kernel is None else PreparedSASRec(self, kernel)


class PreparedSASRec:
    """A SASRec whose weights change no more: by the kernel where the question is what comes after each history."""

    def __init__(self, model: SASRec, kernel: TransformerKernel) -> None:
        self.Config, self.max_length, self.item_weights = model.Config, model.max_length, model.item_weights
        self._model, self.kernel = model, kernel

    @property
    def reads_items_alone(self) -> bool:
        """Whether nothing else of an event counts."""
        return not self._model.events.reads_something

    def encode(self, batch: Batch) -> Tensor:
        """See SequentialModel."""
        if not batch.asks_newest:
            return self._model.encode(batch)
        added_TD = None
        if not self.reads_items_alone:
            zeros_TD = torch.zeros(len(batch.items_T), self._model.norm.normalized_shape[0])
            added_TD = self._model.events(zeros_TD, batch)
        return self.kernel(batch.items_T, batch.lengths_B, added_TD)


class Block(nn.Module):
    """Attention and feed-forward, each normed before and added to what came in."""

    def __init__(self, config: FeedForwardConfig) -> None:
        super().__init__()
        D, inner = config.hidden_dim, config.feedforward_dim or 4 * config.hidden_dim
        self.num_heads = config.num_heads
        self.attention_norm, self.feedforward_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.expand, self.contract = nn.Linear(D, inner), nn.Linear(inner, D)
        self.dropout = Dropout(config.dropout)
        self.attention_dropout = Dropout(config.attention_rate)

    def forward(self, hidden_TD: Tensor, stream: Stream, asked_P: Tensor | None = None) -> Tensor:
        """One block over packed events; (P, D) of some of them alone when `asked_P` names these."""
        qkv_TD3 = linear(hidden_TD, self.qkv, norm=self.attention_norm)
        mixed_TD = stream.attend(qkv_TD3, self.num_heads, self.attention_dropout)
        if asked_P is not None:
            mixed_TD, hidden_TD = mixed_TD[asked_P], hidden_TD[asked_P]
        hidden_TD = linear(mixed_TD, self.out, residual_TO=hidden_TD, dropout=self.dropout)
        inner = linear(hidden_TD, self.expand, norm=self.feedforward_norm)
        return linear(inner, self.contract, gelu=True, residual_TO=hidden_TD, dropout=self.dropout)
