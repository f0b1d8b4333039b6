"""Finding the valid key nearest to a mistyped one."""

import difflib
from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from seqray.component import DEFAULT, config_class

FOREIGN_WORDS = {
    "lr": "learning_rate", "d_model": "hidden_dim", "embedding_dim": "hidden_dim", "n_factors": "hidden_dim",
    "n_layers": "num_blocks", "num_layers": "num_blocks", "n_blocks": "num_blocks", "n_heads": "num_heads",
    "dropout_rate": "dropout", "maxlen": "max_length", "max_len": "max_length", "max_seq_length": "max_length",
    "n_neg": "num_negatives", "filter_viewed": "exclude_seen", "topk": "k", "workers": "num_workers",
    "num_epochs": "epochs", "num_samples": "num_trials", "n_trials": "num_trials",
}  # fmt: skip
"""What other libraries call our keys."""


def unknown_key_message(root: type[BaseModel], keys: Sequence[str], data: Mapping[str, Any]) -> str | None:
    """None when the dotted path `keys` stands in the tree, else a message with the nearest valid path."""
    components = {}
    for kind, default in DEFAULT.items():
        section = data.get(kind)
        type_ = section.get("type", default) if isinstance(section, Mapping) else default
        components[kind] = config_class(kind, str(type_))
    if ".".join(keys) in _paths(root, components):
        return None
    return f"{'.'.join(keys)}: unknown key; nearest: {nearest_key(root, keys, components)}"


def nearest_key(root: type[BaseModel], keys: Sequence[str], components: Mapping[str, type[BaseModel]]) -> str:
    """The valid dotted path most like `keys`: a sibling of nearly that name before the same name elsewhere."""
    *parents, last = keys
    wanted = FOREIGN_WORDS.get(last, last)

    def likeness(path: str) -> float:
        *folder, name = path.split(".")
        same_name = difflib.SequenceMatcher(None, wanted, name).ratio()
        same_folder = difflib.SequenceMatcher(None, ".".join(parents), ".".join(folder)).ratio()
        return same_name + 0.3 * same_folder + 0.2 * (list(parents) == folder)

    return max(_paths(root, components), key=likeness)


def _paths(root: type[BaseModel], components: Mapping[str, type[BaseModel]], prefix: str = "") -> list[str]:
    found = []
    for name, field in root.model_fields.items():
        path = f"{prefix}{name}"
        found.append(path)
        section = _section(field.annotation)
        if not prefix and name in DEFAULT:
            section = components.get(name, config_class(name, DEFAULT[name]))
        if section is not None:
            found += _paths(section, components, f"{path}.")
    return found


def _section(annotation: Any) -> type[BaseModel] | None:
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
