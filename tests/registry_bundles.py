"""Bundles that answer differently, and a registry of them."""

from pathlib import Path

import pyarrow as pa
import torch
from conftest import NUM_ITEMS, save_tiny, tiny_config, tiny_state

from seqray.bundle import Bundle
from seqray.recommender import Query, Recommender
from serve.admission import Admission
from serve.follower import ModelLoader
from serve.promote import promote
from serve.registry import Registry

ADMISSION = Admission(max_bundle_mb=10, max_items=1000)
LOADER = ModelLoader("tiny", "cpu", 1, 8, ADMISSION)


def save_other(folder: Path, number: int, **changes: object) -> Bundle:
    """A bundle whose answers differ from those of any other number."""
    generator = torch.Generator().manual_seed(number)
    state = tiny_state(tiny_config())
    noise = {name: torch.randn(tensor.shape, generator=generator) for name, tensor in sorted(state.items())}
    state = {
        name: tensor + 0.3 * noise[name] if name.startswith("items.") else tensor for name, tensor in state.items()
    }
    return save_tiny(folder, **{"run_id": f"run-{number}", "state": state, **changes})


def registry_of(folder: Path, *numbers: int) -> Registry:
    """A registry whose champions were these bundles, one after the other; the last one is."""
    registry = Registry.at(folder / "registry")
    for number in numbers:
        bundle = save_other(folder / f"bundle-{number}", number)
        promote(registry, ADMISSION, str(bundle.folder))
    return registry


def offline(folder: Path, history: tuple[str, ...], k: int = 5) -> list[tuple[str, float]]:
    """What a bundle answers without a server."""
    [answer] = Recommender(Bundle.load(folder)).recommend([Query(history, k)])
    return [(item.item_id, item.score) for item in answer.items]


def more_items() -> pa.Table:
    """An item table that weights for NUM_ITEMS items do not fit."""
    ids = [f"i{index}" for index in range(1, NUM_ITEMS + 2)]
    return pa.table({"item_id": ids, "train_events": pa.array([1] * len(ids), pa.int64())})
