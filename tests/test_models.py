"""Every model passes the conformance suite, and the suite notices models that should not."""

import pytest
import torch
from broken_models import LooksAhead, MixesTheBatch

from seqray.catalogue import Catalogue
from seqray.conformance import check_causality, check_learns_cycle, check_model, check_packing
from seqray.errors import ConfigError
from seqray.model_sections import BasketConfig, BSARecConfig, SASRecConfig
from seqray.models.protocol import build_model, predict
from seqray.sections import Component
from seqray.sequences import Batch

SASREC = SASRecConfig(hidden_dim=16, num_blocks=1, num_heads=2, dropout=0.1, max_length=8)


@pytest.mark.parametrize("config", [SASREC], ids=lambda config: config.type)
def test_conformance(config: Component) -> None:
    check_model(config)


def test_the_suite_notices_a_model_that_looks_ahead() -> None:
    with pytest.raises(AssertionError, match="before it"):
        check_causality(LooksAhead.Config(type="broken_models:LooksAhead"))


def test_the_suite_notices_a_model_that_mixes_the_batch() -> None:
    with pytest.raises(AssertionError, match="another sequence"):
        check_packing(MixesTheBatch.Config(type="broken_models:MixesTheBatch"))


def test_the_suite_notices_a_model_that_does_not_learn() -> None:
    with pytest.raises(AssertionError, match="hit_rate@1"):
        check_learns_cycle(SASREC, steps=0)


def test_a_class_without_the_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="item_weights"):
        build_model(Component(type="broken_models:NoModel"), Catalogue(5))


def test_padding_has_no_gradient() -> None:
    model = build_model(SASREC, Catalogue(5))
    model.encode(Batch(torch.tensor([1, 2, 0]), torch.tensor([2, 1])))[:, 0].sum().backward()
    gradient = model.item_weights().grad
    assert gradient is not None
    assert not gradient[0].any()
    assert gradient[1:3].any()


@pytest.mark.parametrize("config", [SASREC, BSARecConfig(hidden_dim=16, max_length=8), BasketConfig(max_length=8)])
def test_a_rounded_batch_has_the_same_answers(config: Component) -> None:
    model = build_model(config, Catalogue(12)).eval()
    batch = Batch(torch.tensor([1, 2, 3, 4, 5]), torch.tensor([3, 2])).ask_last()
    rounded = batch.rounded(16, longest=8)
    assert len(rounded.items_T) == 16
    assert int(rounded.lengths_B.max()) <= 8
    assert torch.allclose(predict(model, rounded).scores(), predict(model, batch).scores(), atol=1e-5)


def test_positions_from_the_oldest_make_rows_equal_to_prefixes() -> None:
    model = build_model(SASREC.model_copy(update={"positions_from": "oldest"}), Catalogue(12)).eval()
    row = model.encode(Batch(torch.tensor([1, 2, 3, 4]), torch.tensor([4])))
    for length in range(1, 5):
        prefix = model.encode(Batch(torch.tensor([1, 2, 3, 4][:length]), torch.tensor([length])).ask_last())
        assert torch.allclose(prefix[0], row[length - 1], atol=1e-5)
