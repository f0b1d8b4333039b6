"""Models with a fault each, for tests: named in configs as `broken_models:Class`."""

import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
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


class StruckConfig(Component):
    order: str
    """File that tells what shall happen, `train|eval|write COUNT RANK kill|stop|nan`, once; there may be none."""
    dropout: float = 0.0
    hidden_dim: int = 16


class Struck(SASRec):
    """A SASRec that strikes its own process: in a stated call of `encode` in training or in evaluation, counted from
    the start of the process, or (`write`) when a checkpoint that is written gets its name. Beside a file `slow` a
    step takes a quarter of a second.
    """

    Config = StruckConfig  # type: ignore[assignment]

    def __init__(self, config: StruckConfig, catalogue: Catalogue) -> None:
        sasrec = SASRecConfig(hidden_dim=config.hidden_dim, num_blocks=1, dropout=config.dropout, max_length=8)
        super().__init__(sasrec, catalogue)
        self._order = Path(config.order)
        self._counts = {"train": 0, "eval": 0, "write": 0}
        sys.addaudithook(self._see)

    def encode(self, batch: Batch) -> Tensor:
        hidden = super().encode(batch)
        if self.training and self._order.with_name("slow").exists():
            time.sleep(0.25)
        return hidden * float("nan") if self._is_struck("train" if self.training else "eval") else hidden

    def _see(self, event: str, arguments: tuple[object, ...]) -> None:
        if event == "os.rename" and "/.step_" in str(arguments[0]) and str(arguments[0]).endswith(".new"):
            self._is_struck("write")

    def _is_struck(self, what: str) -> bool:
        """True when the result shall be no number; kills or stops the process when it shall be that."""
        self._counts[what] += 1
        try:
            when, count, rank, how = self._order.read_text().split()
        except (FileNotFoundError, ValueError):
            return False
        here = dist.get_rank() if dist.is_initialized() else 0
        if when != what or int(count) > self._counts[what] or int(rank) != here:
            return False
        self._order.unlink()
        if how != "nan":
            os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])
        return how == "nan"
