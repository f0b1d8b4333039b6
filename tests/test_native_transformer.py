"""The kernel of a whole transformer, against the model in float64; skipped where it cannot run."""

import copy
from typing import Any

import pyarrow as pa
import pytest
import torch
from kernels import needs_kernels
from torch import Tensor

from seqray.catalogue import Catalogue
from seqray.config import Config
from seqray.models.protocol import Module, build_model, prepare
from seqray.models.sasrec import PreparedSASRec
from seqray.sequences import UNKNOWN_TIME, Batch

pytestmark = needs_kernels
ITEMS = 40


def made(**settings: Any) -> Module:
    """A model whose every weight is at work."""
    torch.manual_seed(0)
    settings = {"type": "sasrec", "hidden_dim": 32, "max_length": 20, **settings}
    data = {"path": "log.csv", "columns": {"timestamp": "t", "event": "e"}, "event_types": ["view", "cart"]}
    config = Config.parse({"name": "n", "data": data, "model": settings})
    items = pa.table({"item_id": list(range(ITEMS)), "kind": [f"k{item % 7}" for item in range(ITEMS)]})
    model = build_model(config.model, Catalogue(ITEMS, items, ("view", "cart"))).eval()
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def asked(lengths: list[int]) -> Batch:
    T = sum(lengths)
    times_T = torch.randint(10**14, 10**15, (T,)).cumsum(0)
    times_T[: lengths[0]] = UNKNOWN_TIME
    later_T = torch.where(times_T == UNKNOWN_TIME, times_T, times_T + torch.randint(1, 10**13, (T,)))
    types_T = torch.randint(0, 3, (T,))
    return Batch(torch.randint(1, ITEMS + 1, (T,)), torch.tensor(lengths), None, times_T, later_T, types_T).ask_last()


def kernel_of(model: Module) -> Any:
    prepared = prepare(model, build_kernels=True)
    assert isinstance(prepared, PreparedSASRec)
    return prepared


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_heads": 2, "num_blocks": 1},
        {"num_heads": 4, "hidden_dim": 64, "num_blocks": 3, "feedforward_dim": 100},
        {"hidden_dim": 24, "num_heads": 3, "positions_from": "oldest"},
        {"hidden_dim": 5, "feedforward_dim": 3},
        {"hidden_dim": 80, "normalize": True, "temperature": 0.05},
        {"event_type": True, "time_gap": True, "season": True},
        {"item_columns": [{"column": "kind"}], "separate_output": True},
    ],
    ids=str,
)
def test_hidden_states_are_those_of_float64(settings: dict[str, Any]) -> None:
    model = made(**settings)
    batch = asked([20, 1, 2, 7, 16, 17, 4])
    with torch.inference_mode():
        mine = kernel_of(model).encode(batch)
        its = copy.deepcopy(model).double().encode(batch)
    assert its.abs().mean() > 0.01
    torch.testing.assert_close(mine.double(), its.double(), rtol=1e-4, atol=2e-5 * float(its.abs().max()))


def test_a_result_is_the_same_in_any_batch_and_on_any_threads() -> None:
    kernel = kernel_of(made())
    batch = asked([5, 20, 1, 13, 8])
    ends = batch.lengths_B.cumsum(0).tolist()

    def alone(row: int) -> Tensor:
        start, stop = ends[row] - int(batch.lengths_B[row]), ends[row]
        return kernel.encode(Batch(batch.items_T[start:stop], batch.lengths_B[row : row + 1]).ask_last())

    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            with torch.inference_mode():
                whole = kernel.encode(batch)
                assert torch.equal(whole, torch.cat([alone(row) for row in range(5)]))
    finally:
        torch.set_num_threads(before)


def test_what_is_asked_elsewhere_is_answered_by_the_model() -> None:
    model = made()
    batch = asked([6, 3])
    with torch.inference_mode():
        for other in (
            Batch(batch.items_T, batch.lengths_B),
            Batch(batch.items_T, batch.lengths_B, torch.tensor([2, 8])),
        ):
            assert torch.equal(kernel_of(model).encode(other), model.encode(other))


def test_later_changes_of_the_weights_do_not_count() -> None:
    model = made()
    kernel, batch = kernel_of(model), asked([6, 3])
    with torch.inference_mode():
        before = kernel.encode(batch)
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        assert torch.equal(kernel.encode(batch), before)


@pytest.mark.parametrize("items", [[3, ITEMS + 1], [-1, 3]])
def test_an_item_that_is_not_there_is_an_error(items: list[int]) -> None:
    batch = Batch(torch.tensor(items), torch.tensor([2])).ask_last()
    with pytest.raises(IndexError, match="no such item"):
        kernel_of(made()).encode(batch)


@pytest.mark.parametrize("lengths", [[0, 3], [21]])
def test_a_history_that_is_empty_or_too_long_is_an_error(lengths: list[int]) -> None:
    batch = Batch(torch.ones(sum(lengths), dtype=torch.int64), torch.tensor(lengths)).ask_last()
    with pytest.raises(RuntimeError, match="empty or too long"):
        kernel_of(made()).encode(batch)


def test_other_blocks_are_not_taken_for_these() -> None:
    model = made(type="esasrec")
    assert prepare(model, build_kernels=True) is model
