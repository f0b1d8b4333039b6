"""Fine-tuning: a new run that starts from the weights of a bundle, over its own items."""

from pathlib import Path

import torch
from torch import Tensor

from seqray.bundle import Bundle
from seqray.errors import BundleError
from seqray.models.protocol import Module
from seqray.vocabulary import ItemVocabulary


def start_from_bundle(model: Module, folder: Path, trusted: tuple[str, ...], vocabulary: ItemVocabulary) -> int:
    """Copies the bundle's weights into `model` and gives back how many items it knew.

    Rows of the item weights are matched by item_id; an item that the bundle does not know keeps its first weights.
    BundleError when a tensor is missing or of another size, or the bundle names code that is not `trusted`.
    """
    bundle = Bundle.load(folder, trusted)
    pairs = [(row, bundle.vocabulary.index(vocabulary.item_id(row))) for row in range(1, len(vocabulary) + 1)]
    known = torch.tensor([(0, 0), *((row, old) for row, old in pairs if old)])
    item_weights = model.item_weights().data_ptr()
    for name, tensor in model.state_dict().items():
        given = bundle.state.get(name)
        rows = tensor.data_ptr() == item_weights
        if given is None or given.shape[int(rows) :] != tensor.shape[int(rows) :]:
            raise BundleError(f"{folder}: {name} is {_shape(given)}, the model of this config needs {_shape(tensor)}")
        if rows:
            tensor[known[:, 0]] = given[known[:, 1]].to(tensor)
        else:
            tensor.copy_(given)
    return len(known) - 1


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
