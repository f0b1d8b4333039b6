"""Models with a fault each, for tests: named in configs as `broken_models:Class`."""

import torch
from torch import Tensor, nn

from seqray.catalogue import Catalogue
from seqray.model_sections import SASRecConfig
from seqray.models.sasrec import SASRec
from seqray.sections import Component
from seqray.sequences import Batch


class SmallConfig(Component):
    max_length: int = 8


class LooksAhead(nn.Module):
    """Each hidden state holds the whole sequence."""

    Config = SmallConfig

    def __init__(self, config: SmallConfig, catalogue: Catalogue) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.embedding = nn.Embedding(catalogue.num_items + 1, 4)

    def item_weights(self) -> Tensor:
        return self.embedding.weight

    def encode(self, batch: Batch) -> Tensor:
        parts = self.embedding(batch.items_T).split(batch.lengths_B.tolist())
        return batch.asked(torch.cat([part.mean(0, keepdim=True).expand_as(part) for part in parts]))


class MixesTheBatch(LooksAhead):
    """Each hidden state holds the whole batch."""

    def encode(self, batch: Batch) -> Tensor:
        embedded_TD = self.embedding(batch.items_T)
        return batch.asked(embedded_TD + embedded_TD.mean(0))


class NoModel(nn.Module):
    """Lacks everything that a model needs."""

    Config = SmallConfig

    def __init__(self, config: SmallConfig, catalogue: Catalogue) -> None:
        super().__init__()


class WideFailsConfig(Component):
    hidden_dim: int = 16
    dropout: float = 0.0
    max_length: int = 8


class WideFails(SASRec):
    """A SASRec that cannot be built with 13 dimensions, so that a trial of a search fails."""

    Config = WideFailsConfig  # type: ignore[assignment]

    def __init__(self, config: WideFailsConfig, catalogue: Catalogue) -> None:
        if config.hidden_dim == 13:
            raise RuntimeError("13 dimensions bring bad luck")
        sasrec = SASRecConfig(hidden_dim=config.hidden_dim, num_blocks=1, dropout=config.dropout, max_length=8)
        super().__init__(sasrec, catalogue)


class Explodes(SASRec):
    """A SASRec whose hidden states are not numbers."""

    Config = WideFailsConfig  # type: ignore[assignment]

    def __init__(self, config: WideFailsConfig, catalogue: Catalogue) -> None:
        super().__init__(SASRecConfig(hidden_dim=16, num_blocks=1, max_length=8), catalogue)

    def encode(self, batch: Batch) -> Tensor:
        return super().encode(batch) * float("nan")
