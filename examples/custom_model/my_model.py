"""A model of your own, `my_model:FadingAverage` in a config: averages of the history that fade at learned speeds.

Some dimensions of the history forget all but the newest event, others remember long; training finds out how fast.
Shapes: T packed events, P asked events, B sequences, L events of the longest, D hidden, V items + padding.
"""

import torch
from pydantic import Field
from torch import Tensor, nn

from seqray.catalogue import Catalogue
from seqray.model_sections import SequenceModelConfig
from seqray.models.dropout import Dropout
from seqray.models.grid import Grid
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.sequences import Batch


class FadingAverageConfig(SequenceModelConfig):
    """The `model` section of a config: what all built-in models have (hidden_dim, max_length, ...) and a field more."""

    slowest: float = Field(0.95, ge=0, lt=1)
    """Before training: how much of the history the slowest dimension keeps at each event; the fastest keeps nothing."""


class FadingAverage(nn.Module):
    """average_t = keep x average_(t-1) + (1 - keep) x item_t, with a `keep` between 0 and 1 for each dimension."""

    Config = FadingAverageConfig

    def __init__(self, config: FadingAverageConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.keep_logit_D = nn.Parameter(torch.linspace(0.01, config.slowest, config.hidden_dim).logit())
        self.expand = nn.Linear(config.hidden_dim, 4 * config.hidden_dim)
        self.contract = nn.Linear(4 * config.hidden_dim, config.hidden_dim)
        self.dropout, self.norm = Dropout(config.dropout), nn.LayerNorm(config.hidden_dim)
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """weights_VD: the item embedding; a score is the product of one of its rows with a hidden state."""
        return self.items.weights()

    def encode(self, batch: Batch) -> Tensor:
        """hidden_PD: what is known after each asked event, from it and the events before it."""
        grid = Grid(batch.lengths_B)
        item_BLD = grid.pad(self.dropout(self.events(self.items(batch.items_T), batch)))
        average_TD = self.norm(grid.pack(self._averages(item_BLD)))
        hidden_PD = batch.asked(average_TD)
        hidden_PD = hidden_PD + self.dropout(self.contract(self.expand(hidden_PD).relu()))
        return self.items.question(hidden_PD)

    def _averages(self, item_BLD: Tensor) -> Tensor:
        keep_D = self.keep_logit_D.sigmoid()
        average_BD, averages = torch.zeros_like(item_BLD[:, 0]), []
        for item_BD in item_BLD.unbind(1):
            average_BD = keep_D * average_BD + (1 - keep_D) * item_BD
            averages.append(average_BD)
        return torch.stack(averages, 1)
