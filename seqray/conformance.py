"""Checks that every model has to pass, built in or your own; each raises AssertionError with what is wrong.

from seqray.conformance import check_model
check_model(MyModel.Config(type="my_module:MyModel", hidden_dim=32, max_length=8))
"""

import torch
from torch import Tensor

from seqray.losses import build_loss
from seqray.models.protocol import Module, build_model
from seqray.negatives import Negatives
from seqray.sections import Component, SoftmaxConfig
from seqray.sequences import Batch

NUM_ITEMS = 12
TOLERANCE = 1e-5


def check_model(config: Component) -> None:
    """All checks, on a catalogue of 12 items."""
    check_shapes(config)
    check_causality(config)
    check_packing(config)
    check_repeatable(config)
    check_learns_cycle(config)


def check_shapes(config: Component) -> None:
    """One finite hidden state for each token, one weight vector for each item and padding, of one width."""
    model = _model(config)
    hidden_TD, weights_VD = model.encode(_batch([1, 2, 3], [4])), model.item_weights()
    assert weights_VD.shape[0] == NUM_ITEMS + 1, f"item_weights has {weights_VD.shape[0]} rows, not {NUM_ITEMS + 1}"
    assert hidden_TD.shape == (4, weights_VD.shape[1]), f"encode gave {tuple(hidden_TD.shape)} for 4 tokens"
    assert bool(hidden_TD.isfinite().all()), "hidden states are not finite"


def check_causality(config: Component) -> None:
    """What comes later does not change a hidden state; where positions count from the end, lengths are equal here."""
    model = _model(config)
    before = model.encode(_batch([1, 2, 3, 4]))[:3]
    after = model.encode(_batch([1, 2, 3, 9]))[:3]
    assert torch.equal(before, after), "changing an event changed the hidden states before it"


def check_packing(config: Component) -> None:
    """A sequence's hidden states do not depend on what else is in the batch."""
    model = _model(config)
    alone = model.encode(_batch([5, 6, 7]))
    together = model.encode(_batch([1, 2, 3, 4, 5], [5, 6, 7], [8]))[5:8]
    difference = float((alone - together).abs().max().detach())
    assert difference < TOLERANCE, f"another sequence in the batch moved a hidden state by {difference}"


def check_repeatable(config: Component) -> None:
    """Weights carry the model: a new one with the same weights gives the same hidden states."""
    model, batch = _model(config), _batch([1, 2, 3], [4, 5])
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = build_model(config, NUM_ITEMS).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.encode(batch), other.encode(batch)), "equal weights gave different hidden states"


def check_learns_cycle(config: Component, steps: int = 300) -> None:
    """Learns a catalogue in which the next item is always item + 1 to hit_rate@1 above 0.99."""
    model = _model(config).train()
    loss, generator = build_loss(SoftmaxConfig()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    length = min(6, model.max_length)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for step in range(steps):
            items_BL = _cycles(torch.randint(0, NUM_ITEMS, (32,), generator=generator), length + 1)
            batch = Batch(items_BL[:, :-1].flatten(), torch.full((32,), length))
            targets_T = items_BL[:, 1:].flatten()
            negatives = Negatives((0, 0, step), NUM_ITEMS, torch.arange(len(targets_T)), len(targets_T))
            total = loss(model.encode(batch), targets_T, model.item_weights(), negatives)
            torch.autograd.backward(total / len(targets_T))
            optimizer.step()
            optimizer.zero_grad()
    items_BL = _cycles(torch.arange(NUM_ITEMS), length + 1)
    batch = Batch(items_BL[:, :-1].flatten(), torch.full((NUM_ITEMS,), length))
    hidden_BD = model.eval().encode(batch)[batch.last_token_B()]
    best_B = (hidden_BD @ model.item_weights().T)[:, 1:].argmax(1) + 1
    hit_rate = float((best_B == items_BL[:, -1]).float().mean())
    assert hit_rate > 0.99, f"hit_rate@1 is {hit_rate:.2f} on a catalogue where the next item is always item + 1"


def _model(config: Component) -> Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(config, NUM_ITEMS).eval()


def _batch(*sequences: list[int]) -> Batch:
    return Batch(
        torch.tensor([item for sequence in sequences for item in sequence]),
        torch.tensor([len(sequence) for sequence in sequences]),
    )


def _cycles(start_B: Tensor, length: int) -> Tensor:
    return (start_B.unsqueeze(1) + torch.arange(length)) % NUM_ITEMS + 1
