"""Settings that Ray reads when it is imported, and the tiny bundle that several files use."""

import os
import socket
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
os.environ.update(
    OMP_NUM_THREADS="1",  # models this small are slower on several threads
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_TRAIN_ENABLE_PRINT_PATCH="0",
    RAY_AIR_NEW_OUTPUT="0",
    RAY_DATA_DISABLE_PROGRESS_BARS="1",
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S="1",
    # The workers of a cluster look for modules here; pytest's own additions to sys.path do not reach them.
    PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
)
os.environ.pop("RAY_ADDRESS", None)
if str(ROOT) not in sys.path:  # the programs are packages of the checkout, which plain `pytest` does not look in
    sys.path.insert(0, str(ROOT))

import pyarrow as pa  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from seqray.bundle import Bundle  # noqa: E402
from seqray.catalogue import Catalogue  # noqa: E402
from seqray.config import Config  # noqa: E402
from seqray.models.protocol import build_model  # noqa: E402

NUM_ITEMS = 30
TABLES = ("items.", "events.", "position_embedding.")
FEATURES = {
    "data.columns.event": "what",
    "data.event_types": ["view", "buy"],
    "model.event_type": True,
    "model.time_gap": True,
    "model.season": True,
    "model.item_columns": [{"column": "price", "buckets": 3}],
}
"""A model of the tiny config that reads all there is."""


def tiny_config(**serve: object) -> Config:
    """A small model over a catalogue of NUM_ITEMS items."""
    return Config.parse(
        {
            "name": "tiny",
            "data": {"path": "log.csv"},
            "model": {"hidden_dim": 16, "num_blocks": 1, "max_length": 8, "dropout": 0.5},
            "evaluate": {"exclude_seen": True},
            "serve": serve,
        }
    )


def tiny_items(num_items: int = NUM_ITEMS) -> pa.Table:
    """Items i1, i2, ... with events that fall, but equal for i3 and i4; i2 is the most popular."""
    events = [100 - index for index in range(num_items)]
    events[1], events[2] = 1000, events[3]
    return pa.table(
        {
            "item_id": [f"i{index}" for index in range(1, num_items + 1)],
            "train_events": pa.array(events, pa.int64()),
            "title": [f"Título {index}" for index in range(1, num_items + 1)],
            "price": [float(index) if index % 2 else None for index in range(1, num_items + 1)],
        }
    )


def tiny_state(config: Config, num_items: int = NUM_ITEMS) -> dict[str, torch.Tensor]:
    """Weights large enough that scores differ."""
    catalogue = Catalogue(num_items, tiny_items(num_items), config.data.event_types)
    with torch.random.fork_rng():
        torch.manual_seed(7)
        state = build_model(config.model, catalogue).state_dict()
    return {name: tensor * 20 if name.startswith(TABLES) else tensor for name, tensor in state.items()}


def save_tiny(folder: Path, **changes: object) -> Bundle:
    """Saves the tiny bundle with some arguments of Bundle.save replaced."""
    config = tiny_config()
    arguments: dict[str, object] = {
        "config": config,
        "state": tiny_state(config),
        "items": tiny_items(),
        "metrics": {"test/ndcg@10": 0.25, "baselines": {"popularity": {"test/ndcg@10": 0.125}}},
        "data_fingerprint": "abc123",
        "run_id": "tiny-1",
        "curve": [{"epoch": epoch, "step": epoch, "train/loss": 3.0 / epoch} for epoch in (1, 2, 3)],
    }
    return Bundle.save(folder, **{**arguments, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def featured_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle whose model reads event types, times and a column of the items."""
    config = tiny_config().override(FEATURES)
    return save_tiny(tmp_path_factory.mktemp("bundles") / "featured", config=config, state=tiny_state(config))


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle that tests read and leave alone."""
    return save_tiny(tmp_path_factory.mktemp("bundles") / "tiny")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture
def free_port() -> int:
    """A port of loopback that nothing listens on."""
    return _free_port()


@pytest.fixture(scope="module")
def module_port() -> int:
    """The same for a server that a whole file uses."""
    return _free_port()
