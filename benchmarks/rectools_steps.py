"""The peer's side of train_speed: SASRec of RecTools 0.19, trained by its own fit; imports nothing of seqray.

Runs in the environment of peer_environment.py. Everything is as RecTools' documentation has it: Dataset.construct,
SASRecModel, a trainer from get_trainer_func. Only a callback is added, which stops the clock after an optimizer step
and waits for the driver. It trains on all but each user's last two events, as we do with split leave_one_out.

What differs, by the design of RecTools or its defaults:
- It always pads to max_length, on the left, and the loss takes logits for padding too; we pack the real tokens.
- blocks=sasrec, its default: q + attention(q, x, x) with q = norm(x), then f + feed_forward(f) with f = norm of that;
  ours is x + attention(norm(x)), then x + feed_forward(norm(x)). Feed-forward is 1 x hidden_dim wide with ReLU; we
  set feedforward_dim = hidden_dim and keep GELU. Same number of parameters. Dropout: inside and after the
  feed-forward layer, none after the attention; ours after both and not inside. On attention weights: the same.
- blocks=pre_norm (its PreLNTransformerLayers): our residuals, 4 x hidden_dim wide with GELU as is our default; no norm
  after the last block, one more dropout after each block and one inside the feed-forward layer.
- Its catalogue has the items of its training windows only, and the loss counts padding as a class. Item embeddings
  are not scaled. Adam is not fused, gradients are not clipped; ours is, and they are. All of that is small.
The same: embeddings of items and of inverse positions, tied output, dropout rates, Adam(1e-3, (0.9, 0.98)), mean
cross-entropy over real positions, the newest max_length + 1 events of a user, shuffled batches of whole users.
"""

import argparse
import logging
import warnings
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.net_blocks import PreLNTransformerLayers
from rectools.models.nn.transformers.sasrec import SASRecTransformerLayers

from benchmarks.step_protocol import Facts, Stopwatch, settle, side_parser

LAYERS = {"sasrec": SASRecTransformerLayers, "pre_norm": PreLNTransformerLayers}
LOSSES = {"softmax": "softmax", "bce": "BCE", "gbce": "gBCE"}


class AskedSteps(Callback):
    """Trains when the driver asks, and stands still otherwise."""

    def __init__(self, stopwatch: Stopwatch) -> None:
        self._stopwatch = stopwatch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step, when data, weights and trainer are ready, sends the facts."""
        if trainer.global_step == 0:
            self._stopwatch.start(facts_of(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After each optimizer step."""
        padded_BL, loss = batch["x"], outputs["loss"]
        self._stopwatch.step_done(len(padded_BL), lambda: int((padded_BL != 0).sum()), lambda: float(loss))


def facts_of(trainer: Trainer, module: LightningModule) -> Facts:
    """What the trainer is about to train."""
    histories = trainer.train_dataloader.dataset.sessions
    return Facts(
        program="RecTools",
        parameters=sum(weight.numel() for weight in module.torch_model.parameters()),
        items=module.torch_model.item_model.n_items - 1,
        sequences=len(histories),
        real_tokens=sum(len(history) - 1 for history in histories),
        steps=int(trainer.num_training_batches),
    )


def training_events(events: pd.DataFrame) -> Dataset:
    """All but each user's last two events; the row number stands for the time, so the order stays."""
    events = events[["user_id", "item_id"]].assign(
        **{Columns.Weight: 1.0, Columns.Datetime: pd.to_datetime(np.arange(len(events)), unit="s")}
    )
    known = events.groupby("user_id").cumcount(ascending=False) >= 2
    return Dataset.construct(events[known].rename(columns={"user_id": Columns.User, "item_id": Columns.Item}))


def endless_trainer(device: str, precision: str) -> Trainer:
    """Lightning without progress bar, summary, log, checkpoints and validation."""
    return Trainer(
        max_epochs=-1, accelerator={"cpu": "cpu", "cuda": "gpu"}[device], devices=1, logger=False,
        precision={"fp32": "32-true", "bf16": "bf16-mixed", "auto": "32-true"}[precision],
        callbacks=[AskedSteps(Stopwatch(device))],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip


def model_of(arguments: argparse.Namespace) -> SASRecModel:
    """SASRec of the asked sizes."""
    return SASRecModel(
        n_blocks=arguments.num_blocks, n_heads=arguments.num_heads, n_factors=arguments.hidden_dim,
        dropout_rate=arguments.dropout, session_max_len=arguments.max_length, batch_size=arguments.batch_size,
        loss=LOSSES[arguments.loss], n_negatives=arguments.num_negatives, gbce_t=0.75, lr=1e-3, use_pos_emb=True,
        item_net_block_types=(IdEmbeddingsItemNet,), transformer_layers_type=LAYERS[arguments.blocks],
        dataloader_num_workers=arguments.loader_workers, get_trainer_func=endless_trainer,
        get_trainer_func_kwargs={"device": arguments.device, "precision": arguments.precision},
    )  # fmt: skip


def main() -> None:
    """Trains until the driver closes the line."""
    parser = side_parser(__doc__)
    parser.add_argument("--loader-workers", type=int, default=0, help="processes of the data loader; 0, its default")
    arguments = parser.parse_args()
    settle(arguments.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.manual_seed(42)
    dataset = training_events(pd.read_parquet(arguments.events))
    model_of(arguments).fit(dataset)


if __name__ == "__main__":
    main()
