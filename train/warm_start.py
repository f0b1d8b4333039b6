"""Fine-tuning: a new run that starts from the weights of a bundle, over its own items."""

import torch
from torch import Tensor

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.config import Config
from seqray.errors import BundleError, SeqrayError
from seqray.models.items import ItemTable, NamedTable
from seqray.models.protocol import Module, build_model
from seqray.sequences import SequenceStore
from seqray.vocabulary import ItemVocabulary
from train.layout import load_model
from train.place import from_first, is_first


def start_from(model: Module, config: Config, folder: str, store: SequenceStore) -> int:
    """`start_from_bundle` for a model that may lie on several workers, all of which call it; BundleError on all."""
    fresh, known, problem = None, 0, ""
    if is_first():
        torch.manual_seed(config.seed)
        fresh = build_model(config.model, store.catalogue)
        try:
            bundle = Bundle.load(folder, config.component_types, Cache.of(config.cluster))
            known = start_from_bundle(fresh, bundle, store.vocabulary)
        except SeqrayError as error:
            problem = str(error)
    known, problem = from_first((known, problem))
    if problem:
        raise BundleError(problem)
    load_model(model, {} if fresh is None else dict(fresh.state_dict()))
    return known


def start_from_bundle(model: Module, bundle: Bundle, vocabulary: ItemVocabulary) -> int:
    """Copies the bundle's weights into `model` and gives back how many items it knew.

    Rows of what holds a row for each item are matched by item_id, those of categories and event types by their text;
    a row that the bundle does not know keeps its first weights. BundleError when a tensor is missing or of another
    size.
    """
    old_rows = row_names(bundle.model(), bundle.vocabulary)
    new_rows = row_names(model, vocabulary)
    for name, tensor in model.state_dict().items():
        given, names = bundle.state.get(name), new_rows.get(name)
        matched = names is not None and name in old_rows
        if given is None or given.shape[int(matched) :] != tensor.shape[int(matched) :]:
            raise BundleError(
                f"{bundle.location}: {name} is {_shape(given)}, the model of this config needs {_shape(tensor)}"
            )
        if names is None or not matched:
            tensor.copy_(given)
        else:
            rows, old = _matches(names, old_rows[name])
            tensor[rows] = given[old].to(tensor)
    return sum(bundle.vocabulary.index(vocabulary.item_id(row)) > 0 for row in range(1, len(vocabulary) + 1))


def row_names(model: Module, vocabulary: ItemVocabulary) -> dict[str, list[str]]:
    """What the rows of a tensor of the state stand for from row 1 on, for each tensor that has a row for a name.

    Items: every ItemTable, and a parameter that `item_weights()` gives back as it is. Categories and event types:
    every NamedTable.
    """
    items = [str(vocabulary.item_id(row)) for row in range(1, len(vocabulary) + 1)]
    item_weights = model.item_weights().data_ptr()
    found = {name: items for name, tensor in model.state_dict().items() if tensor.data_ptr() == item_weights}
    for name, module in model.named_modules():
        if isinstance(module, ItemTable):
            found[f"{name}.weight"] = items
        elif isinstance(module, NamedTable):
            found[f"{name}.weight"] = list(module.names)
    return found


def _matches(names: list[str], old_names: list[str]) -> tuple[Tensor, Tensor]:
    """(row, row in the bundle) of every name that both have, and of row 0."""
    old_row = {name: row for row, name in enumerate(old_names, start=1)}
    pairs = [(row, old_row[name]) for row, name in enumerate(names, start=1) if name in old_row]
    rows, old = torch.tensor([(0, 0), *pairs]).T
    return rows, old


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
