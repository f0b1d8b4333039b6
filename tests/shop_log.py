"""A tiny shop for tests: users walk around a circle of items, so the next item can be learnt."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from seqray.config import Config

NUM_ITEMS = 20


def write_log(folder: Path, num_users: int = 60) -> Path:
    """A log of 6 to 14 events a user, an event a day; one step in five leaves the circle."""
    random = np.random.default_rng(0)
    rows: list[tuple[str, int, int]] = []
    for user in range(num_users):
        item = int(random.integers(NUM_ITEMS))
        for day in range(int(random.integers(6, 15))):
            rows.append((f"u{user:03d}", 100 + item, 1_700_000_000 + 86_400 * day + user))
            item = (item + 1) % NUM_ITEMS if random.random() < 0.8 else int(random.integers(NUM_ITEMS))
    users, items, times = zip(*rows, strict=True)
    path = folder / "log.parquet"
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": times}), path)
    return path


def shop_config(folder: Path, **sections: dict[str, Any] | str | int) -> Config:
    """A config over that log, with everything it makes under `folder`; trains in this process, without dropout.

    A section adds to the one here, or stands for it when it names a `type`.
    """
    log = folder / "log.parquet"
    if not log.exists():
        write_log(folder)
    tree: dict[str, Any] = {
        "name": "shop",
        "output": str(folder / "out"),
        "data": {"path": str(log)},
        "model": {"hidden_dim": 16, "num_blocks": 1, "dropout": 0.0, "max_length": 8},
        "train": {
            "num_workers": 0, "device": "cpu", "precision": "fp32", "epochs": 4, "batch_size": 16,
            "learning_rate": 0.01, "checkpoint_steps": 3,
        },
        "evaluate": {"exclude_seen": False},
        "tracking": {"mode": "disabled"},
        "cluster": {"address": "local"},
    }  # fmt: skip
    for name, section in sections.items():
        tree[name] = (
            {**tree.get(name, {}), **section} if isinstance(section, dict) and "type" not in section else section
        )
    return Config.parse(tree)
