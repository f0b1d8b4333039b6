"""Bundle: a trained model as a folder of plain files, everything that serving needs and nothing that runs on load."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seqray import __version__
from seqray.bundle_report import git_commit, model_card
from seqray.cache import Cache
from seqray.catalogue import Catalogue
from seqray.component import DEFAULT, MODULE_ATTRIBUTE, is_built_in
from seqray.config import NAME, Config
from seqray.errors import BundleError, ConfigError
from seqray.manifest import verify_manifest, write_manifest
from seqray.models.protocol import Module, build_model
from seqray.storage import MANIFEST_FILE
from seqray.training_curve import draw_training_curve
from seqray.vocabulary import ItemVocabulary
from seqray.yaml_file import parse_yaml

CONFIG_FILE = "config.yaml"
WEIGHTS_FILE = "model.safetensors"
ITEMS_FILE = "items.parquet"
METRICS_FILE = "metrics.json"
CURVE_FILE = "training.png"
CARD_FILE = "README.md"
REQUIRED = (CONFIG_FILE, WEIGHTS_FILE, ITEMS_FILE, METRICS_FILE, CARD_FILE)


@dataclass(frozen=True, eq=False)
class Bundle:
    """A verified bundle: `items` in index order (row 0 is item_index 1), `state` the weights by name."""

    folder: Path
    """Where its files lie on this machine."""
    location: str
    """The path or URI that it was asked for by."""
    config: Config
    items: pa.Table
    metrics: dict[str, Any]
    manifest: dict[str, Any]
    state: dict[str, Tensor]

    @classmethod
    def save(
        cls,
        folder: str | Path,
        *,
        config: Config,
        state: Mapping[str, Tensor],
        items: pa.Table,
        metrics: Mapping[str, Any],
        data_fingerprint: str | Mapping[str, str],
        run_id: str,
        curve: Sequence[Mapping[str, Any]] = (),
        parent: str | None = None,
    ) -> "Bundle":
        """Writes a bundle to a local folder and checks it as `load` does, before it gets its name.

        items: item_id, train_events, then the user's columns. metrics: the model's under their keys, and
        "baselines": {name: {key: value}}. curve: rows of the training history. BundleError when `folder` exists.
        """
        target = Path(folder)
        _check_items(items, f"{target}: {ITEMS_FILE}")
        about = {
            "run_id": run_id,
            "data_fingerprint": data_fingerprint,
            "parent": parent,
            "git_commit": git_commit(),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seqray_version": __version__,
            "torch_version": str(torch.__version__),
        }
        with _new_folder(target) as temporary:
            (temporary / CONFIG_FILE).write_text(config.yaml(), encoding="utf-8")
            save_file({name: _plain_tensor(tensor) for name, tensor in state.items()}, temporary / WEIGHTS_FILE)
            pq.write_table(items, temporary / ITEMS_FILE)
            text = json.dumps(metrics, indent=1, ensure_ascii=False, allow_nan=False)
            (temporary / METRICS_FILE).write_text(text + "\n", encoding="utf-8")
            if curve:
                title = f"{config.name} ({run_id})"
                draw_training_curve(temporary / CURVE_FILE, curve, config.train.monitor, title)
            card = model_card(config, items, metrics, about, bool(curve))
            (temporary / CARD_FILE).write_text(card, encoding="utf-8")
            write_manifest(temporary, about, [path.name for path in temporary.iterdir()])
            bundle = cls.load(temporary, trusted=config.component_types)
        return replace(bundle, folder=target, location=str(target))

    @classmethod
    def load(cls, folder: str | Path, trusted: tuple[str, ...] = (), cache: Cache | None = None) -> "Bundle":
        """A bundle whose files match its manifest, and whose weights fit its config and its items.

        `trusted` names the `module:attribute` components that may be imported: to import a module that a bundle
        names is to run its code. Of a bundle behind a URI a copy is loaded that this machine keeps in `cache`
        (the default one when not given). BundleError names the folder and the file, DataError a URI that nothing can be
        fetched from.
        """
        location, folder = str(folder), (cache or Cache()).fetch(folder)
        manifest = verify_manifest(folder)
        for name in REQUIRED:
            if name not in manifest["files"]:
                raise BundleError(f"{folder}: {name} is missing")
        if not NAME.fullmatch(str(manifest.get("run_id"))):
            raise BundleError(f"{folder}: {MANIFEST_FILE}: run_id {manifest.get('run_id')!r} is not a name")
        config = _read_config(folder, trusted)
        items, metrics, state = _read_items(folder), _read_metrics(folder), _read_weights(folder)
        bundle = cls(folder, location, config, items, metrics, manifest, state)
        bundle._check_weights()
        return bundle

    @property
    def version(self) -> str:
        """The id of the run that made it."""
        return str(self.manifest["run_id"])

    @property
    def num_items(self) -> int:
        """Items, padding not counted."""
        return int(self.items.num_rows)

    @property
    def catalogue(self) -> Catalogue:
        """What the model is built for."""
        return Catalogue(self.num_items, self.items, self.config.data.event_types)

    @cached_property
    def vocabulary(self) -> ItemVocabulary:
        """The items of the bundle; BundleError when an id is there twice."""
        try:
            return ItemVocabulary(self.items.column("item_id"))
        except ValueError as error:
            raise BundleError(f"{self.folder}: {ITEMS_FILE}: {error}") from error

    def model(self) -> Module:
        """The model with its weights, in eval mode, on the CPU; the same object at each call."""
        return self._model

    @cached_property
    def _model(self) -> Module:
        with torch.random.fork_rng(devices=[]):  # the weights that a model starts with are drawn for nothing here
            model = build_model(self.config.model, self.catalogue)
        self._compare(model.state_dict())
        model.load_state_dict(self.state)
        return model.eval()

    def _check_weights(self) -> None:
        """Building the model is the last check: it compares names and shapes."""
        if len(self.vocabulary) == 0:
            raise BundleError(f"{self.folder}: {ITEMS_FILE} holds no items")
        for name, tensor in self.state.items():
            if not bool(torch.isfinite(tensor).all()):
                raise BundleError(f"{self.folder}: {WEIGHTS_FILE}: {name} holds values that are not finite")
        self.model()

    def _compare(self, wanted: Mapping[str, Tensor]) -> None:
        place = f"{self.folder}: {WEIGHTS_FILE}"
        missing, unknown = sorted(wanted.keys() - self.state.keys()), sorted(self.state.keys() - wanted.keys())
        if missing or unknown:
            raise BundleError(f"{place}: does not fit the model: missing {missing}, unknown {unknown}")
        for name, tensor in wanted.items():
            given = self.state[name]
            if given.shape != tensor.shape or given.is_floating_point() != tensor.is_floating_point():
                raise BundleError(
                    f"{place}: {name} is {given.dtype} {tuple(given.shape)}, the model with {self.num_items} items "
                    f"({ITEMS_FILE}) needs {tensor.dtype} {tuple(tensor.shape)}"
                )


@contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `target` when the block ends well, and is removed when it does not."""
    if target.exists():
        raise BundleError(f"{target}: already exists; a bundle is never written over")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise BundleError(f"{target}: cannot write the bundle: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _plain_tensor(tensor: Tensor) -> Tensor:
    # A copy of its own: safetensors refuses tensors that share memory.
    return tensor.detach().to("cpu", copy=True).contiguous()


def _read_config(folder: Path, trusted: tuple[str, ...]) -> Config:
    source = f"{folder}: {CONFIG_FILE}"
    try:
        data = parse_yaml((folder / CONFIG_FILE).read_text(encoding="utf-8"), source)
        if not isinstance(data, dict):
            raise BundleError(f"{source}: not a mapping of sections")
        for type_ in _foreign_types(data):
            if type_ not in trusted:
                raise BundleError(f"{source}: {type_!r} is code of its own; name it as trusted to let it run")
        return Config.parse(data, source)
    except (ConfigError, UnicodeDecodeError) as error:
        raise BundleError(str(error)) from error


def _foreign_types(data: Mapping[str, Any]) -> Iterator[str]:
    """Every `module:attribute` that parsing the config would import: of the components and of the searched values."""
    for kind, default in DEFAULT.items():
        section = data.get(kind)
        type_ = str(section.get("type", default)) if isinstance(section, Mapping) else default
        if not is_built_in(kind, type_):
            yield type_
    tune = data.get("tune")
    if isinstance(tune, Mapping):
        yield from (text for text in _texts(tune.get("space")) if MODULE_ATTRIBUTE.fullmatch(text))


def _texts(data: Any) -> Iterator[str]:
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping):
        for value in data.values():
            yield from _texts(value)
    elif isinstance(data, list):
        for value in data:
            yield from _texts(value)


def _read_items(folder: Path) -> pa.Table:
    place = f"{folder}: {ITEMS_FILE}"
    try:
        items = pq.read_table(folder / ITEMS_FILE)
    except (OSError, pa.ArrowException) as error:
        raise BundleError(f"{place}: cannot be read: {error}") from error
    _check_items(items, place)
    return items


def _check_items(items: pa.Table, place: str) -> None:
    for name in ("item_id", "train_events"):
        if items.column_names.count(name) != 1:
            raise BundleError(f"{place}: needs one column {name}, has {', '.join(items.column_names)}")
        if items.column(name).null_count:
            raise BundleError(f"{place}: {name} holds nulls")
    if not pa.types.is_integer(items.schema.field("train_events").type):
        raise BundleError(f"{place}: train_events is {items.schema.field('train_events').type}, not whole numbers")


def _read_metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{folder}: {METRICS_FILE}: cannot be read: {error}") from error
    if not isinstance(metrics, dict):
        raise BundleError(f"{folder}: {METRICS_FILE}: not a mapping")
    return metrics


def _read_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, SafetensorError, ValueError) as error:
        raise BundleError(f"{folder}: {WEIGHTS_FILE}: cannot be read: {error}") from error
