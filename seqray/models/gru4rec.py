"""GRU4Rec: a recurrent network over the history (Hidasi et al., Session-based Recommendations with RNNs, 2016).

Shapes: T packed events, P asked events, D hidden, G width of the GRU, V items + padding.
"""

from torch import Tensor, nn

from seqray.catalogue import Catalogue
from seqray.model_sections import GRU4RecConfig
from seqray.models.dropout import Dropout
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.models.stream import Stream
from seqray.sequences import Batch

TILE = 2**22
"""Sequences times the square of their length that run side by side: few runs, and little padding in each."""


class GRU4Rec(nn.Module):
    """Item embedding, GRU layers, and a linear layer back to the width of the items."""

    Config = GRU4RecConfig

    def __init__(self, config: GRU4RecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        D, G = config.hidden_dim, config.gru_dim or config.hidden_dim
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.dropout = Dropout(config.dropout)
        between = config.dropout if config.num_blocks > 1 else 0.0
        self.gru = nn.GRU(D, G, config.num_blocks, batch_first=True, dropout=between)
        self.out = nn.Linear(G, D)
        self._scale = D**0.5
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state after each asked event, from it and the events before it."""
        hidden_TD = self.dropout(self.events(self.items(batch.items_T) * self._scale, batch))
        stream = Stream(batch.lengths_B, TILE)
        hidden_TG = stream.join([self.gru(tile.take(hidden_TD))[0] for tile in stream.tiles])
        return self.items.question(self.out(self.dropout(batch.asked(hidden_TG))))
