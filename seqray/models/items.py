"""Items and events as vectors: what goes into the built-in models, and what their hidden states meet at the end.

Shapes: T packed events, P asked events, D hidden, V items + padding, K distinct lists of an item's
categories, C the longest of them.
"""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.errors import ConfigError
from seqray.model_sections import SequenceModelConfig
from seqray.sequences import UNKNOWN_TIME, Batch

DAY = 86_400_000_000
"""Microseconds."""
GAP_BUCKETS = 52
WEEKS = 53


class ItemTable(nn.Embedding):
    """A row for each item, zeros for padding; fine-tuning matches its rows by item_id."""

    rows = slice(None)
    """Items whose rows are here: all, unless workers share them out."""

    def __init__(self, num_items: int, dim: int) -> None:
        super().__init__(num_items + 1, dim, padding_idx=0)


class NamedTable(nn.Embedding):
    """A row for each name, from 1 on; row 0, all zeros, stands for none. Fine-tuning matches its rows by name."""

    def __init__(self, names: Sequence[str], dim: int) -> None:
        super().__init__(len(names) + 1, dim, padding_idx=0)
        self.names = tuple(names)

    def means(self, lists_KC: Tensor) -> Tensor:
        """(K, D) mean of the rows of each list, zeros in it left out; a zero vector when it has no others."""
        return F.embedding_bag(lists_KC, self.weight, mode="mean", padding_idx=0)


class ItemEmbedding(nn.Module):
    """An embedding for each item plus the one of each of its columns; row 0 is padding and all zeros."""

    def __init__(self, config: SequenceModelConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.embedding = ItemTable(catalogue.num_items, config.hidden_dim)
        self.output = ItemTable(catalogue.num_items, config.hidden_dim) if config.separate_output else None
        self.normalize, self.temperature = config.normalize, config.temperature
        self.columns = nn.ModuleList()
        for index, wanted in enumerate(config.item_columns):
            column = catalogue.codes(wanted)
            self.register_buffer(f"lists_{index}", column.lists_KC, persistent=False)
            self.register_buffer(f"list_{index}", column.list_V, persistent=False)
            self.columns.append(NamedTable(column.names, config.hidden_dim))

    def forward(self, items_T: Tensor) -> Tensor:
        """(T, D) vectors of items that are read."""
        vectors_TD = self.embedding(items_T)
        for list_V, means_KD in self._columns():
            vectors_TD = vectors_TD + F.embedding(list_V[items_T], means_KD)
        return cast(Tensor, vectors_TD)

    def vectors(self) -> Tensor:
        """(V, D) vectors of all items as `forward` reads them."""
        weights_VD = self.embedding.weight
        return weights_VD if not self.columns else self(torch.arange(len(weights_VD), device=weights_VD.device))

    def weights(self) -> Tensor:
        """weights_VD of items that are scored."""
        table = self.embedding if self.output is None else self.output
        weights_VD: Tensor = table.weight
        for list_V, means_KD in self._columns():
            weights_VD = weights_VD + F.embedding(list_V[table.rows], means_KD)
        return F.normalize(weights_VD, dim=1) if self.normalize else weights_VD

    def question(self, hidden_PD: Tensor) -> Tensor:
        """Hidden states as they meet `weights`: normalised where the weights are, divided by the temperature."""
        if self.normalize:
            hidden_PD = F.normalize(hidden_PD.float(), dim=1)
        return hidden_PD if self.temperature == 1 else hidden_PD / self.temperature

    def _columns(self) -> Iterator[tuple[Tensor, Tensor]]:
        # Many items share a list, so the mean is taken for each list and not for each item.
        for index, table in enumerate(self.columns):
            yield self.get_buffer(f"list_{index}"), cast(NamedTable, table).means(self.get_buffer(f"lists_{index}"))


class EventEmbedding(nn.Module):
    """What is known of an event beside its item: its type, the time until the next one, and the season of that."""

    def __init__(self, config: SequenceModelConfig, catalogue: Catalogue) -> None:
        super().__init__()
        D = config.hidden_dim
        if config.event_type and not catalogue.event_types:
            raise ConfigError("model.event_type: needs data.columns.event and data.event_types")
        self.event = NamedTable(catalogue.event_types, D) if config.event_type else None
        self.gap = nn.Embedding(GAP_BUCKETS + 1, D, padding_idx=0) if config.time_gap else None
        self.week = nn.Embedding(WEEKS + 1, D, padding_idx=0) if config.season else None
        self.weekday = nn.Embedding(8, D, padding_idx=0) if config.season else None

    @property
    def reads_something(self) -> bool:
        """Whether anything is added."""
        return not (self.event is self.gap is self.week is None)

    def forward(self, vectors_TD: Tensor, batch: Batch) -> Tensor:
        """(T, D) item vectors with the events' own vectors added; what is not known adds nothing."""
        if self.event is not None and batch.events_T is not None:
            vectors_TD = vectors_TD + self.event(batch.events_T)
        if batch.next_times_T is None or batch.times_T is None:
            return vectors_TD
        if self.gap is not None:
            vectors_TD = vectors_TD + self.gap(gap_row(batch.times_T, batch.next_times_T))
        if self.week is not None and self.weekday is not None:
            known_T = is_known(batch.next_times_T)
            day_T = torch.div(batch.next_times_T, DAY, rounding_mode="floor")
            vectors_TD = vectors_TD + self.week((_week(day_T) + 1) * known_T)
            vectors_TD = vectors_TD + self.weekday((day_T % 7 + 1) * known_T)
        return vectors_TD


def is_known(times: Tensor) -> Tensor:
    """Whether somebody told the time; a model must not count with one that nobody did."""
    return times != UNKNOWN_TIME


def gap_row(earlier: Tensor, later: Tensor) -> Tensor:
    """Row, in an embedding of GAP_BUCKETS + 1 rows, of the time between two: 1 + `gap_bucket`, or 0 where one of them
    is unknown. For a bias by time, too (HSTU): with padding_idx 0 there is none where there is no time.
    """
    return (gap_bucket(later - earlier) + 1) * (is_known(earlier) & is_known(later))


def gap_bucket(gap: Tensor) -> Tensor:
    """Bucket of a time in microseconds, from 0 to GAP_BUCKETS - 1: 0 below 1.4 s and where time goes back, then two for
    each doubling, to 2 years; longer ones share the last.
    """
    seconds = gap.clamp(min=0).double() / 1e6
    return (2 * torch.log2(seconds.clamp(min=1))).floor().clamp(max=GAP_BUCKETS - 1).long()


def _week(day: Tensor) -> Tensor:
    return torch.div((day.double() % 365.2425), 7, rounding_mode="floor").long().clamp(max=WEEKS - 1)


def initialize(module: nn.Module) -> None:
    """For `nn.Module.apply`: Xavier for linear layers, a normal of 0.02 for embeddings, padding zero."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
