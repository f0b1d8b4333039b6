"""BasketTransformer: SASRec over baskets instead of events, with a head for repeat purchases.

A basket is the events of one user at one time; without times each event is one. A basket's vector is the mean of its
events' vectors. What is in the basket so far counts as all of it. Shapes: T packed events, K packed baskets,
P asked events, D hidden, V items + padding.
"""

from typing import cast

import torch
from torch import Tensor, nn

from seqray.catalogue import Catalogue
from seqray.errors import ConfigError
from seqray.model_sections import BasketConfig
from seqray.models.dropout import Dropout
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize, is_known
from seqray.models.protocol import HistoryScores
from seqray.models.repeat import RepeatHead
from seqray.models.sasrec import Block
from seqray.models.stream import Stream
from seqray.sequences import Batch


class BasketTransformer(nn.Module):
    """Whole histories are short when counted in baskets, so `max_length` events can be many."""

    Config = BasketConfig

    def __init__(self, config: BasketConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.position_embedding = nn.Embedding(config.max_baskets, config.hidden_dim)
        self.size_embedding = nn.Embedding(16, config.hidden_dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self._scale = config.hidden_dim**0.5
        self.repeat = RepeatHead(catalogue.num_items, config.hidden_dim) if config.repeats else None
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after each asked event, the last one of its basket, from its basket and those before."""
        basket_T, ends_K, lengths_B = baskets(batch)
        stream = Stream(lengths_B)
        count_K = torch.bincount(basket_T, minlength=len(ends_K))
        vectors_TD = self.items(batch.items_T) * self._scale
        sums_KD = vectors_TD.new_zeros(len(ends_K), vectors_TD.shape[1]).index_add_(0, basket_T, vectors_TD)
        vectors_KD = sums_KD / count_K.unsqueeze(1)
        size_K = count_K.float().log2().mul(2).long().clamp(max=15)
        age_K = stream.age_T.clamp(max=self.position_embedding.num_embeddings - 1)
        vectors_KD = self.events(vectors_KD + self.size_embedding(size_K), _at(batch, ends_K))
        hidden_KD = self.dropout(vectors_KD + self.position_embedding(age_K))
        for block in self.blocks:
            hidden_KD = block(hidden_KD, stream)
        asked_P = batch.asked_places()
        basket_P = basket_T[asked_P]
        if not torch.equal(ends_K[basket_P], asked_P):  # its hidden state would know what comes after the event
            raise ConfigError("model.type basket answers after whole baskets: train it with train.target: next_basket")
        return self.items.question(self.norm(hidden_KD[basket_P]))

    def history_scores(self, batch: Batch, hidden_PD: Tensor) -> HistoryScores | None:
        """What the repeat head adds for items of the history."""
        return None if self.repeat is None else cast(HistoryScores, self.repeat(batch, hidden_PD, baskets(batch)[0]))


def baskets(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """(basket of each event, its last event, baskets of each sequence) as basket_T, ends_K, lengths_B."""
    T = len(batch.items_T)
    last_T = torch.zeros(T, dtype=torch.bool, device=batch.items_T.device)
    last_B = batch.last_token_B()
    if batch.times_T is None:
        last_T[:] = True
    else:
        last_T[:-1] = (batch.times_T[1:] != batch.times_T[:-1]) | ~is_known(batch.times_T[:-1])
        last_T[last_B] = True
    before_T = last_T.cumsum(0)
    return before_T - last_T.long(), last_T.nonzero().squeeze(1), before_T[last_B].diff(prepend=before_T.new_zeros(1))


def _at(batch: Batch, events_K: Tensor) -> Batch:
    """The given events as a batch of their own."""
    parts = (None if part is None else part[events_K] for part in (batch.times_T, batch.next_times_T, batch.events_T))
    return Batch(batch.items_T[events_K], batch.lengths_B, None, *parts)
