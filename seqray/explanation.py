"""Which events of a history drove an item: leave one event out, and see by how much its score falls.

Shapes: E events that are left out (one at a time), K items.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from seqray.histories import HistoryReader, KnownHistory
from seqray.models.protocol import SequentialModel, predict
from seqray.query import Influence

MAX_EXPLAINED = 50
"""Events of a history that are left out, the newest ones: each costs one more history in the batch."""
SHOWN = 5
"""Influences told of an item."""


def influences(
    model: SequentialModel,
    reader: HistoryReader,
    weights_VD: Tensor,
    history_ids: Sequence[Hashable],
    known: KnownHistory,
    items: Sequence[int],
) -> tuple[tuple[Influence, ...], ...]:
    """Of each item (item_index, each once) the events without which its score falls, by one batched forward pass."""
    if not items:
        return ()
    if len(known.items) == 1:
        [place] = known.places
        return ((Influence(place, history_ids[place], None),),) * len(items)
    left_out = range(max(0, len(known.items) - MAX_EXPLAINED), len(known.items))
    histories = [known, *(known.without(event) for event in left_out)]
    prediction = predict(model, reader.batch(histories).to(weights_VD.device), weights_VD)
    scores = prediction.scores_of(torch.tensor(items, device=weights_VD.device))
    effects_KE = (scores[:1] - scores[1:]).T
    values, events = effects_KE.sort(dim=1, descending=True, stable=True)
    found = []
    for effects, order in zip(values[:, :SHOWN].tolist(), events[:, :SHOWN].tolist(), strict=True):
        places = [known.places[left_out[event]] for event in order]
        pairs = zip(places, effects, strict=True)
        found.append(tuple(Influence(place, history_ids[place], effect) for place, effect in pairs if effect > 0))
    return tuple(found)
