"""Checks that every model has to pass, built in or your own; each raises AssertionError with what is wrong.

from seqray.conformance import check_model
check_model(MyModel.Config(type="my_module:MyModel", hidden_dim=32, max_length=8))
"""

import torch
from torch import Tensor

from seqray.catalogue import Catalogue
from seqray.losses import build_loss
from seqray.models.protocol import Module, build_model, is_causal, predict
from seqray.negatives import step_negatives
from seqray.samples import Step, Targets
from seqray.sections import Component, SoftmaxConfig
from seqray.sequences import Batch

NUM_ITEMS = 12
CATALOGUE = Catalogue(NUM_ITEMS)
TOLERANCE = 1e-5


def check_model(config: Component) -> None:
    """All checks, on a catalogue of 12 items."""
    check_shapes(config)
    check_causality(config)
    check_packing(config)
    check_repeatable(config)
    check_learns_cycle(config)


def check_shapes(config: Component) -> None:
    """One finite hidden state for each asked event, one weight vector for each item and padding, of one width."""
    model = _model(config)
    batch = _batch([1, 2, 3], [4])
    weights_VD = model.item_weights()
    assert weights_VD.shape[0] == NUM_ITEMS + 1, f"item_weights has {weights_VD.shape[0]} rows, not {NUM_ITEMS + 1}"
    for asked, count in ((batch, 4), (batch.ask_last(), 2)) if is_causal(model) else ((batch.ask_last(), 2),):
        hidden_PD = model.encode(asked)
        assert hidden_PD.shape == (count, weights_VD.shape[1]), f"encode gave {tuple(hidden_PD.shape)} for {count}"
        assert bool(hidden_PD.isfinite().all()), "hidden states are not finite"


def check_causality(config: Component) -> None:
    """What comes later does not change a hidden state; where positions count from the end, lengths are equal here."""
    model = _model(config)
    if not is_causal(model):
        return
    before = model.encode(_batch([1, 2, 3, 4]))[:3]
    after = model.encode(_batch([1, 2, 3, 9]))[:3]
    assert torch.equal(before, after), "changing an event changed the hidden states before it"


def check_packing(config: Component) -> None:
    """A sequence's scores do not depend on what else is in the batch."""
    model = _model(config)
    alone = predict(model, _batch([5, 6, 7]).ask_last()).scores()
    together = predict(model, _batch([1, 2, 3, 4, 5], [5, 6, 7], [8]).ask_last()).scores()[1:2]
    difference = float((alone - together).abs().max().detach())
    assert difference < TOLERANCE, f"another sequence in the batch moved a score by {difference}"


def check_repeatable(config: Component) -> None:
    """Weights carry the model: a new one with the same weights gives the same scores."""
    model, batch = _model(config), _batch([1, 2, 3], [4, 5]).ask_last()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = build_model(config, CATALOGUE).eval()
    other.load_state_dict(model.state_dict())
    same = torch.equal(predict(model, batch).scores(), predict(other, batch).scores())
    assert same, "equal weights gave different scores"


def check_learns_cycle(config: Component, steps: int = 300) -> None:
    """Learns a catalogue in which the next item is always item + 1 to hit_rate@1 above 0.99."""
    model = _model(config).train()
    loss, generator = build_loss(SoftmaxConfig()), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    length = min(6, model.max_length)
    view = getattr(model, "training_view", None)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for number in range(steps):
            step = _cycle_step(
                torch.randint(0, NUM_ITEMS, (32,), generator=generator), length, is_causal(model) or view is not None
            )
            negatives = step_negatives((0, 0, number), NUM_ITEMS, step)
            step = step if view is None else view(step, negatives)
            total = loss(predict(model, step.batch), step.targets, negatives)
            torch.autograd.backward(total / step.global_targets)
            optimizer.step()
            optimizer.zero_grad()
    step = _cycle_step(torch.arange(NUM_ITEMS), length, causal=False)
    scores_BV = predict(model.eval(), step.batch).scores()
    hit_rate = float((scores_BV[:, 1:].argmax(1) + 1 == step.targets.items_S).float().mean())
    assert hit_rate > 0.99, f"hit_rate@1 is {hit_rate:.2f} on a catalogue where the next item is always item + 1"


def _model(config: Component) -> Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model(config, CATALOGUE).eval()


def _batch(*sequences: list[int]) -> Batch:
    return Batch(
        torch.tensor([item for sequence in sequences for item in sequence]),
        torch.tensor([len(sequence) for sequence in sequences]),
    )


def _cycle_step(start_B: Tensor, length: int, causal: bool) -> Step:
    """Sequences that go round from `start_B`; a target after every event, or after the newest alone."""
    items_BL = (start_B.unsqueeze(1) + torch.arange(length + 1)) % NUM_ITEMS + 1
    batch = Batch(items_BL[:, :-1].flatten(), torch.full((len(start_B),), length))
    items_S = items_BL[:, 1:].flatten() if causal else items_BL[:, -1]
    asked = batch if causal else batch.ask_last()
    return Step(asked, Targets(items_S, None, torch.arange(len(items_S))), 1, len(items_S), len(batch.items_T))
