"""Models that read whole sequences: BSARec and its filter, BERT4Rec and its masks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from shop_log import shop_config

from seqray.catalogue import Catalogue
from seqray.conformance import check_model
from seqray.errors import ConfigError
from seqray.losses import build_loss
from seqray.model_sections import BERT4RecConfig, BSARecConfig
from seqray.models.bert4rec import BERT4Rec
from seqray.models.bsarec import Block, Places, low_frequencies
from seqray.models.items import DAY
from seqray.models.protocol import predict
from seqray.negatives import step_negatives
from seqray.recommender import Query, Recommender
from seqray.samples import Step, Targets
from seqray.sections import BCEConfig, Component, SampledSoftmaxConfig, SoftmaxConfig
from seqray.sequences import Batch
from train.fit import fit

BSAREC = BSARecConfig(hidden_dim=16, num_blocks=2, num_heads=2, dropout=0.1, max_length=8)
BERT4REC = BERT4RecConfig(hidden_dim=32, num_blocks=1, num_heads=2, dropout=0.1, max_length=8)
LENGTHS = [3, 9, 1, 5]


@pytest.mark.parametrize("config", [BSAREC, BERT4REC], ids=lambda config: config.type)
def test_conformance(config: Component) -> None:
    check_model(config)


@pytest.mark.parametrize(("length", "count"), [(9, 5), (10, 1), (10, 4), (10, 10), (10, 99)])
def test_the_filter_is_that_of_a_fourier_transform_with_zeros_in_front(length: int, count: int) -> None:
    lengths_B = torch.tensor(LENGTHS)
    hidden_TD = torch.randn(sum(LENGTHS), 4, dtype=torch.float64)
    places = Places(lengths_B, low_frequencies(length, count))
    expected = []
    for part in hidden_TD.split(LENGTHS):
        padded = torch.cat([torch.zeros(length - len(part), 4, dtype=torch.float64), part])
        spectrum = torch.fft.rfft(padded, dim=0, norm="ortho")
        spectrum[count // 2 + 1 :] = 0
        expected.append(torch.fft.irfft(spectrum, n=length, dim=0, norm="ortho")[-len(part) :])
    torch.testing.assert_close(places.low_pass(hidden_TD), torch.cat(expected), rtol=0, atol=1e-12)
    newest = torch.stack([part[-1] for part in expected])
    torch.testing.assert_close(places.newest_low_pass(hidden_TD), newest, rtol=0, atol=1e-12)


def test_a_block_for_the_newest_events_is_the_block_for_all() -> None:
    torch.manual_seed(0)
    block = Block(BSAREC).eval()
    places = Places(torch.tensor([3, 8, 1, 5]), low_frequencies(8, 5).float())
    hidden_TD = torch.randn(17, 16)
    torch.testing.assert_close(block(hidden_TD, places, newest=True), block(hidden_TD, places)[places.last_B])


KEY = (7, 0, 3)


def row_steps(world: int) -> list[Step]:
    """A step of rows, shared out among workers as TrainingSamples does it; items ascend by 1 in each."""
    lengths = torch.tensor([3, 8, 1, 5, 2, 7])
    first = torch.tensor([1, 11, 21, 31, 41, 51])
    begin = lengths.cumsum(0) - lengths
    steps = []
    for rank in range(world):
        rows = range(rank, len(lengths), world)
        items_T = torch.cat([first[row] + torch.arange(int(lengths[row])) for row in rows])
        places = torch.cat([begin[row] + torch.arange(int(lengths[row])) for row in rows])
        batch = Batch(items_T, lengths[list(rows)], None, items_T * DAY, (items_T + 1) * DAY, torch.ones_like(items_T))
        steps.append(Step(batch, Targets(items_T + 1, None, places), 1, int(lengths.sum()), int(lengths.sum())))
    return steps


def bert4rec(mask_share: float = 0.4) -> BERT4Rec:
    torch.manual_seed(0)
    config = BERT4RecConfig(
        hidden_dim=16, num_blocks=2, num_heads=2, dropout=0, max_length=8, mask_share=mask_share,
        event_type=True, time_gap=True, season=True,
    )  # fmt: skip
    model = BERT4Rec(config, Catalogue(60, event_types=("view", "cart")))
    return model.eval()


def view(model: BERT4Rec, step: Step, key: tuple[int, int, int] = KEY) -> Step:
    return model.training_view(step, step_negatives(key, 60, step))


def test_the_view_masks_targets_and_asks_for_them() -> None:
    model = bert4rec()
    [step] = row_steps(1)
    seen = view(model, step)
    batch = seen.batch
    assert batch.lengths_B.tolist() == [4, 9, 2, 6, 3, 8]
    original_T = torch.cat(
        [first + torch.arange(n) for first, n in zip((1, 11, 21, 31, 41, 51), batch.lengths_B, strict=True)]
    )
    assert batch.asked_P is not None
    is_asked_T = torch.zeros(len(original_T), dtype=torch.bool)
    is_asked_T[batch.asked_P] = True
    assert torch.equal(batch.items_T == model.mask_item, is_asked_T)
    assert torch.equal(batch.items_T[~is_asked_T], original_T[~is_asked_T])
    assert torch.equal(seen.targets.items_S, original_T[is_asked_T])
    assert seen.targets.places_S.tolist() == list(range(len(batch.asked_P)))
    assert seen.global_targets == len(batch.asked_P)
    begin_B = batch.lengths_B.cumsum(0) - batch.lengths_B
    assert not is_asked_T[begin_B].any()
    assert batch.times_T is not None and batch.next_times_T is not None and batch.events_T is not None
    assert torch.equal(batch.times_T, original_T * DAY)
    assert torch.equal(batch.next_times_T[is_asked_T], batch.times_T[is_asked_T])
    assert not batch.events_T[is_asked_T].any()


def test_the_share_of_masks_is_the_configs() -> None:
    model = bert4rec(0.25)
    [step] = row_steps(1)
    masked = sum(view(model, step, (7, 0, number)).global_targets for number in range(400))
    assert masked / (400 * step.global_targets) == pytest.approx(0.25, abs=0.02)


def test_two_workers_mask_what_one_masks() -> None:
    model = bert4rec()
    [whole] = [view(model, step) for step in row_steps(1)]
    halves = [view(model, step) for step in row_steps(2)]
    assert [half.global_targets for half in halves] == [whole.global_targets] * 2
    pairs = zip(whole.targets.places_S.tolist(), whole.targets.items_S.tolist(), strict=True)
    found = [zip(h.targets.places_S.tolist(), h.targets.items_S.tolist(), strict=True) for h in halves]
    assert sorted(pairs) == sorted(pair for half in found for pair in half)


def test_what_was_masked_does_not_leak() -> None:
    model = bert4rec()
    [step] = row_steps(1)
    seen = view(model, step)
    places = (seen.batch.asked_P[seen.batch.asked_P < 4] - 1).tolist()  # type: ignore[index]
    assert places, "nothing is masked in the first row"
    items_S = step.targets.items_S.clone()
    items_T, events_T = step.batch.items_T.clone(), step.batch.events_T.clone()  # type: ignore[union-attr]
    for place in places:
        items_S[place] = 60
        if place + 1 < 3:
            items_T[place + 1], events_T[place + 1] = 60, 2
    other = replace(
        step, batch=replace(step.batch, items_T=items_T, events_T=events_T),
        targets=replace(step.targets, items_S=items_S),
    )  # fmt: skip
    assert torch.equal(model.encode(view(model, other).batch), model.encode(seen.batch))


def test_the_newest_target_stands_in_the_view() -> None:
    model = bert4rec()
    [step] = row_steps(1)
    seen = view(model, step)
    last = seen.batch.last_token_B()[1]
    changed = replace(seen.batch, items_T=seen.batch.items_T.index_fill(0, last.view(1), 60))
    assert not torch.equal(model.encode(changed), model.encode(seen.batch))


def test_a_mask_after_the_history_is_what_inference_asks_for() -> None:
    model = bert4rec()
    items_T = torch.tensor([1, 2, 3])
    history = Batch(items_T, torch.tensor([3]), None, items_T * DAY, (items_T + 1) * DAY, torch.ones_like(items_T))
    with_mask = Batch(
        torch.tensor([1, 2, 3, model.mask_item]), torch.tensor([4]), torch.tensor([3]),
        torch.tensor([1, 2, 3, 4]) * DAY, torch.tensor([2, 3, 4, 4]) * DAY, torch.tensor([1, 1, 1, 0]),
    )  # fmt: skip
    assert torch.equal(model.encode(history.ask_last()), model.encode(with_mask))


@pytest.mark.parametrize("loss", [SoftmaxConfig(), SampledSoftmaxConfig(num_negatives=4), BCEConfig()])
def test_a_worker_without_masks_takes_part_all_the_same(loss: Component) -> None:
    model = bert4rec(1e-9)
    [step] = row_steps(1)
    seen = view(model, step)
    assert (len(seen.targets.items_S), seen.global_targets) == (0, 1)
    total = build_loss(loss)(predict(model, seen.batch), seen.targets, step_negatives(KEY, 60, seen))
    total.backward()
    assert float(total.detach()) == 0
    unused = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert not unused, "DDP waits for these"
    assert not any(bool(parameter.grad.any()) for parameter in model.parameters() if parameter.grad is not None)


def test_prefixes_are_refused() -> None:
    [step] = row_steps(1)
    with pytest.raises(ConfigError, match=r"train\.samples: rows"):
        view(bert4rec(), replace(step, batch=step.batch.ask_last()))


@pytest.mark.parametrize("fields", [{"type": "bsarec"}, {"type": "bert4rec", "mask_share": 0.4}])
def test_it_trains_into_a_bundle_that_recommends(tmp_path: Path, fields: dict[str, Any]) -> None:
    model = {"hidden_dim": 32, "num_blocks": 1, "dropout": 0.0, "max_length": 8, "time_gap": True, **fields}
    bundle = fit(shop_config(tmp_path, model=model, train={"epochs": 40, "batch_size": 32}))
    assert bundle.metrics["test/ndcg@10"] > 2 * bundle.metrics["baselines"]["popularity"]["test/ndcg@10"]
    [answer] = Recommender(bundle).recommend([Query((104, 105, 106), k=3)])
    assert answer.items[0].source == "model"
