"""BERT4Rec: a transformer that reads in both directions and fills in masked events (Sun et al., BERT4Rec: Sequential
Recommendation with Bidirectional Encoder Representations from Transformer, 2019).

The blocks are SASRec's. A mask stands at the end of the history to ask for what comes next.
Shapes: T packed events, B sequences, L longest of the batch, P masked events, S targets of this worker and G of the
global batch before masking, D hidden, H heads.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.errors import ConfigError
from seqray.model_sections import BERT4RecConfig
from seqray.models.dropout import Dropout
from seqray.models.grid import Grid
from seqray.models.items import EventEmbedding, ItemEmbedding, initialize
from seqray.models.sasrec import Block
from seqray.models.stream import Stream
from seqray.negatives import MASKS, Negatives
from seqray.samples import Step, Targets
from seqray.sequences import Batch


class BERT4Rec(nn.Module):
    """Sees max_length events and the mask after them; nothing is known of a masked event but its time."""

    Config = BERT4RecConfig
    causal = False

    def __init__(self, config: BERT4RecConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.mask_item = catalogue.num_items + 1
        """Stands for an item that was masked."""
        self._mask_share = config.mask_share
        self.items = ItemEmbedding(config, catalogue)
        self.events = EventEmbedding(config, catalogue)
        self.mask_D = nn.Parameter(torch.randn(config.hidden_dim) * 0.02)
        self.position_embedding = nn.Embedding(config.max_length + 1, config.hidden_dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.norm = nn.LayerNorm(config.hidden_dim)
        self._scale = config.hidden_dim**0.5
        self.apply(initialize)

    def item_weights(self) -> Tensor:
        """The item embedding."""
        return self.items.weights()

    def training_view(self, step: Step, negatives: Negatives) -> Step:
        """The same sequences with their newest targets in place and a random share of all targets masked.

        ConfigError when the step is not one of rows with the next item after every event.
        """
        batch, targets = step.batch, step.targets
        if batch.asked_P is not None or targets.rows_S is not None:
            raise ConfigError("model.type bert4rec learns with train.samples: rows and train.target: next_item")
        every_G = torch.arange(step.global_targets, device=targets.places_S.device)
        masked_G = negatives.random(MASKS, every_G, 1).squeeze(1) < self._mask_share
        masked_S = masked_G.index_select(0, targets.places_S)
        newest_B = targets.items_S.index_select(0, batch.last_token_B())
        place_S = _place_T(batch) + 1  # the target after an event stands right behind it
        place_P = place_S[masked_S]
        chosen = Targets(
            targets.items_S[masked_S], None, (masked_G.cumsum(0) - 1).index_select(0, targets.places_S[masked_S]),
            None if targets.weights_S is None else targets.weights_S[masked_S],
        )  # fmt: skip
        return replace(
            step, batch=self._masked(_appended(batch, newest_B), place_P), targets=chosen,
            global_targets=max(1, int(masked_G.sum())),
        )  # fmt: skip

    def encode(self, batch: Batch) -> Tensor:
        """Hidden state of each mask that is asked for; of one after each history when no masks are asked for."""
        if batch.asked_P is None or not bool((batch.items_T.index_select(0, batch.asked_P) == self.mask_item).all()):
            batch = _appended(batch, torch.full_like(batch.lengths_B, self.mask_item))
            batch = self._masked(batch, batch.last_token_B())
        stream = TwoWayStream(batch.lengths_B)
        masked_T = batch.items_T == self.mask_item
        item_TD = self.items(batch.items_T.masked_fill(masked_T, 0))
        item_TD = torch.where(masked_T.unsqueeze(1), self.mask_D, item_TD) * self._scale
        hidden_TD = self.dropout(self.events(item_TD, batch) + self.position_embedding(stream.age_T))
        for block in self.blocks:
            hidden_TD = block(hidden_TD, stream)
        return self.items.question(self.norm(batch.asked(hidden_TD)))

    def _masked(self, batch: Batch, place_P: Tensor) -> Batch:
        """The batch asked at `place_P`, where it holds masks; nothing is known of what comes after one."""
        events_T = None if batch.events_T is None else batch.events_T.index_fill(0, place_P, 0)
        next_times_T = batch.next_times_T
        if batch.times_T is not None and next_times_T is not None:
            next_times_T = next_times_T.index_copy(0, place_P, batch.times_T.index_select(0, place_P))
        items_T = batch.items_T.index_fill(0, place_P, self.mask_item)
        return replace(batch, items_T=items_T, asked_P=place_P, next_times_T=next_times_T, events_T=events_T)


class TwoWayStream(Stream):
    """Attention over whole sequences: an event sees those after it too."""

    def __init__(self, lengths_B: Tensor) -> None:
        super().__init__(lengths_B)
        self._grid = Grid(lengths_B)
        padding_BL = torch.arange(self._grid.L, device=lengths_B.device) >= lengths_B.unsqueeze(1)
        self._bias_B11L = torch.zeros(padding_BL.shape, device=lengths_B.device).masked_fill_(padding_BL, float("-inf"))
        self._bias_B11L = self._bias_B11L[:, None, None]

    def attend(self, qkv_TD3: Tensor, num_heads: int, dropout: Dropout) -> Tensor:
        """(T, 3D) -> (T, D): softmax(q k' / sqrt(d)) v over all events of the sequence."""
        padded_BLD3 = self._grid.pad(qkv_TD3)
        q, k, v = padded_BLD3.view(*padded_BLD3.shape[:2], 3, num_heads, -1).permute(2, 0, 3, 1, 4)
        bias_B11L = self._bias_B11L.to(q.dtype)
        if q.device.type == "cpu":
            shares = (torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(2, 3)) + bias_B11L).softmax(3)
            mixed = torch.matmul(dropout(shares), v)
        else:
            rate = dropout.rate if dropout.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias_B11L, dropout_p=rate)
        return self._grid.pack(mixed.transpose(1, 2).flatten(2))


def _place_T(batch: Batch) -> Tensor:
    """Where each event stands once every sequence has one event more."""
    count = len(batch.items_T)
    row_B = torch.arange(len(batch.lengths_B), device=batch.items_T.device)
    row_T = torch.repeat_interleave(row_B, batch.lengths_B, output_size=count)
    return torch.arange(count, device=batch.items_T.device) + row_T


def _appended(batch: Batch, items_B: Tensor) -> Batch:
    """The batch with an event more after each sequence: at the time of the next event or query, of unknown type."""
    place_T, old_last_B, lengths_B = _place_T(batch), batch.last_token_B(), batch.lengths_B + 1
    last_B = lengths_B.cumsum(0) - 1

    def widened(values_T: Tensor | None, added_B: Tensor | None) -> Tensor | None:
        if values_T is None or added_B is None:
            return None
        wider = values_T.new_empty(len(values_T) + len(added_B))
        return wider.index_copy_(0, place_T, values_T).index_copy_(0, last_B, added_B)

    items_T = widened(batch.items_T, items_B)
    assert items_T is not None
    time_B = None if batch.next_times_T is None else batch.next_times_T.index_select(0, old_last_B)
    return Batch(
        items_T, lengths_B, last_B, widened(batch.times_T, time_B), widened(batch.next_times_T, time_B),
        widened(batch.events_T, torch.zeros_like(items_B)),
    )  # fmt: skip
