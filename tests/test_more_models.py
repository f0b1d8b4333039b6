"""eSASRec, HSTU and GRU4Rec: the conformance suite, and each against its formulas written plainly."""

from dataclasses import replace
from itertools import pairwise

import pyarrow as pa
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.conformance import check_model
from seqray.model_sections import ESASRecConfig, GRU4RecConfig, HSTUConfig, ItemColumn, SASRecConfig
from seqray.models.dropout import Dropout
from seqray.models.esasrec import LiGRBlock
from seqray.models.gru4rec import GRU4Rec
from seqray.models.hstu import HSTU, Block
from seqray.models.protocol import Module, build_model, predict
from seqray.models.stream import Stream, attend_fused
from seqray.sections import Component
from seqray.sequences import UNKNOWN_TIME, Batch

ESASREC = ESASRecConfig(hidden_dim=16, num_blocks=1, num_heads=2, dropout=0.1, max_length=8)
HSTU_CONFIG = HSTUConfig(hidden_dim=16, num_blocks=2, num_heads=2, dropout=0.1, max_length=8)
GRU4REC = GRU4RecConfig(hidden_dim=16, gru_dim=24, dropout=0.1, max_length=8)
CONFIGS = [ESASREC, HSTU_CONFIG, GRU4REC]
LENGTHS = torch.tensor([3, 150, 1, 4, 8, 8, 2])
HOUR = 3_600_000_000


def named(config: Component) -> str:
    return config.type


def log(lengths_B: Tensor, num_items: int = 12, seed: int = 0) -> Batch:
    """Sequences of random items and random times, seconds to weeks apart."""
    generator = torch.Generator().manual_seed(seed)
    T = int(lengths_B.sum())
    gap_T = (10 ** (6 * torch.rand(T, generator=generator))).long() * 1_000_000
    return Batch(
        torch.randint(1, num_items + 1, (T,), generator=generator), lengths_B, None,
        gap_T.cumsum(0) - gap_T, gap_T.cumsum(0), torch.randint(0, 3, (T,), generator=generator),
    )  # fmt: skip


def model_for(config: Component, catalogue: Catalogue | None = None) -> Module:
    torch.manual_seed(0)
    return build_model(config, catalogue or Catalogue(12)).eval()


def hstu(**settings: object) -> HSTU:
    torch.manual_seed(0)
    return HSTU(HSTU_CONFIG.model_copy(update=settings), Catalogue(12)).double().eval()


def blocks(model: HSTU) -> list[Block]:
    return [block for block in model.blocks if isinstance(block, Block)]


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_conformance(config: Component) -> None:
    check_model(config)


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_every_input_and_output_has_its_effect(config: Component) -> None:
    items = pa.table({"item_id": [f"i{n}" for n in range(12)], "genre": ["a", "b", "c"] * 4})
    features = {
        "item_columns": [ItemColumn(column="genre", buckets=None)], "event_type": True, "time_gap": True,
        "season": True, "separate_output": True, "normalize": True, "temperature": 0.5,
    }  # fmt: skip
    rich = type(config).model_validate({**config.model_dump(), **features, "type": config.type})
    model, batch = model_for(rich, Catalogue(12, items, ("view", "buy"))).train(), log(torch.tensor([3, 8, 1]))
    prediction = predict(model, batch)
    assert prediction.scores().abs().max() <= 2.001
    torch.autograd.backward(prediction.scores().square().sum())
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), f"{name} has no part in the scores"


@pytest.mark.parametrize("num_heads", [1, 2])
def test_attention_is_what_its_formula_says(num_heads: int) -> None:
    torch.manual_seed(0)
    qkv_TD3 = torch.randn(int(LENGTHS.sum()), 24, dtype=torch.float64, requires_grad=True)
    slope_TD = torch.randn(len(qkv_TD3), 8, dtype=torch.float64)
    expected = []
    for rows in torch.tensor_split(qkv_TD3, LENGTHS.cumsum(0)[:-1]):
        q, k, v = rows.view(len(rows), 3, num_heads, -1).permute(1, 2, 0, 3)
        scores = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(
            torch.ones(len(rows), len(rows)).triu(1).bool(), -torch.inf
        )
        expected.append((scores.softmax(2) @ v).transpose(0, 1).flatten(1))
    mixed_TD = Stream(LENGTHS).attend(qkv_TD3, num_heads, Dropout(0.0))
    torch.testing.assert_close(mixed_TD, torch.cat(expected))
    slopes = [torch.autograd.grad(mixed, qkv_TD3, slope_TD) for mixed in (mixed_TD, torch.cat(expected))]
    torch.testing.assert_close(*slopes)


def test_attention_dropout_drops_its_share_and_keeps_its_slopes() -> None:
    torch.manual_seed(0)
    lengths_B = torch.full((20,), 60)
    qkv_TD3 = torch.zeros(1200, 3, dtype=torch.float64)
    qkv_TD3[:, 2] = 1
    qkv_TD3.requires_grad_()
    mixed_TD = Stream(lengths_B).attend(qkv_TD3, 1, Dropout(0.25).train())
    assert 0.97 < float(mixed_TD.detach().mean()) < 1.03
    assert float(mixed_TD.detach().std()) > 0.05
    (slope_TD3,) = torch.autograd.grad(mixed_TD.sum(), qkv_TD3)
    torch.testing.assert_close(slope_TD3[:, 2].sum(), mixed_TD.sum())  # linear in the values


def test_positions_count_from_the_newest_event() -> None:
    assert Stream(torch.tensor([2, 3])).age_T.tolist() == [1, 0, 2, 1, 0]


def test_esasrec_block_is_what_its_formula_says() -> None:
    torch.manual_seed(0)
    block, hidden_TD = LiGRBlock(ESASREC).double().eval(), torch.randn(5, 16, dtype=torch.float64)
    normed = block.attention_norm(hidden_TD)
    q, k, v = block.qkv(normed).view(5, 3, 2, 8).permute(1, 2, 0, 3)
    attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).flatten(1)
    middle = hidden_TD + block.out(attended) * torch.sigmoid(block.attention_gate(hidden_TD))
    normed = block.feedforward_norm(middle)
    fed = block.contract(F.silu(block.switch(normed)) * block.expand(normed))
    expected = middle + fed * torch.sigmoid(block.feedforward_gate(middle))
    torch.testing.assert_close(block(hidden_TD, Stream(torch.tensor([5]))), expected)
    assert block.switch.weight.shape == (64, 16)


def slow_bucket(microseconds: int) -> int:
    seconds, bucket, edge = microseconds / 1e6, 0, 1.0
    while seconds >= (edge * 1.5 if bucket % 2 == 0 else edge * 2) and bucket < 51:
        bucket, edge = bucket + 1, edge * 2 if bucket % 2 else edge
    return bucket


def slow_block(block: Block, hidden_TD: Tensor, batch: Batch) -> Tensor:
    """Equations 1 to 3 with loops over sequences, heads, queries and keys."""
    D, H = hidden_TD.shape[1], block.num_heads
    u, v, q, k = F.silu(F.layer_norm(hidden_TD, (D,), eps=1e-6) @ block.uvqk.weight.T).chunk(4, 1)
    mixed_TD = torch.zeros_like(hidden_TD)
    ends = [0, *batch.lengths_B.cumsum(0).tolist()]
    for begin, end in pairwise(ends):
        for query in range(begin, end):
            for head in range(H):
                part = slice(head * D // H, (head + 1) * D // H)
                for key in range(begin, query + 1):
                    bias = block.position_bias[query - key]
                    if batch.times_T is not None and batch.next_times_T is not None and block.time_bias is not None:
                        bias = bias + block.time_bias[slow_bucket(int(batch.next_times_T[query] - batch.times_T[key]))]
                    weight = F.silu(q[query, part] @ k[key, part] + bias) / (query - begin + 1)
                    mixed_TD[query, part] = mixed_TD[query, part] + weight * v[key, part]
    added_TD: Tensor = block.out(F.layer_norm(mixed_TD, (D,), eps=1e-6) * u)
    return hidden_TD + added_TD


@pytest.mark.parametrize("times", [True, False], ids=["times", "no times"])
def test_hstu_is_what_its_equations_say(times: bool) -> None:
    batch = log(torch.tensor([3, 8, 1, 5]))
    batch = batch if times else replace(batch, times_T=None, next_times_T=None)
    model = hstu()
    for block in blocks(model):
        torch.nn.init.normal_(block.position_bias)
        assert block.time_bias is not None
        torch.nn.init.normal_(block.time_bias)
    hidden_TD = model.items(batch.items_T) * 4.0
    for block in blocks(model):
        hidden_TD = slow_block(block, hidden_TD, batch)
    outputs = [model.norm(hidden_TD), model.encode(batch)]
    torch.testing.assert_close(outputs[1], outputs[0])
    slope_TD = torch.randn_like(outputs[0])
    wanted = list(model.parameters())
    slow, fast = (torch.autograd.grad(out, wanted, slope_TD, materialize_grads=True) for out in outputs)
    torch.testing.assert_close(fast, slow)


def test_hstu_does_not_depend_on_tiles_and_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hstu(max_length=200)
    batch = log(LENGTHS)
    outputs = []
    for slab, cells in ((1000, 2**20), (7, 100)):
        monkeypatch.setattr("seqray.models.stream.SLAB", slab)
        monkeypatch.setattr("seqray.models.stream.CELLS_IN_CACHE", cells)
        hidden_PD = model.encode(batch)
        outputs.append(
            [hidden_PD, *torch.autograd.grad(hidden_PD.sin().sum(), list(model.parameters()), materialize_grads=True)]
        )
    torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("time_bias", [True, False])
def test_hstu_knows_the_time_of_the_query(time_bias: bool) -> None:
    model = hstu(time_bias=time_bias)
    batch = log(torch.tensor([4])).ask_last()
    assert batch.next_times_T is not None
    later = replace(batch, next_times_T=batch.next_times_T + torch.tensor([0, 0, 0, 999 * HOUR]))
    assert torch.equal(model.encode(batch), model.encode(later)) is not time_bias


def test_hstu_has_no_time_bias_where_times_are_unknown() -> None:
    model, batch = hstu(), log(torch.tensor([4, 3]))
    assert batch.times_T is not None and batch.next_times_T is not None
    unknown_T = torch.tensor([True] * 4 + [False] * 3)
    partly = replace(
        batch, times_T=batch.times_T.masked_fill(unknown_T, UNKNOWN_TIME),
        next_times_T=batch.next_times_T.masked_fill(unknown_T, UNKNOWN_TIME),
    )  # fmt: skip
    without = replace(batch, times_T=None, next_times_T=None)
    torch.testing.assert_close(model.encode(partly)[:4], model.encode(without)[:4])
    torch.testing.assert_close(model.encode(partly)[4:], model.encode(batch)[4:])


def test_hstu_attention_dropout_has_slopes() -> None:
    torch.manual_seed(0)
    model = hstu(attention_dropout=0.5, dropout=0.0).train()
    batch = log(torch.tensor([4, 3, 6]))
    parameter = blocks(model)[0].uvqk.weight

    def total() -> Tensor:
        torch.manual_seed(1)
        return model.encode(batch).sin().sum()

    (slope,) = torch.autograd.grad(total(), parameter)
    with torch.no_grad():
        before = total()
        parameter += 1e-10 * slope
        change = total() - before
    torch.testing.assert_close(change / 1e-10, slope.square().sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_gru4rec_packed_is_as_one_by_one(num_blocks: int) -> None:
    model = GRU4Rec(GRU4REC.model_copy(update={"num_blocks": num_blocks}), Catalogue(12)).double().eval()
    batch = log(torch.tensor([3, 8, 1, 8, 5]))
    alone = [
        model.out(model.gru(model.items(items) * 4)[0])
        for items in torch.tensor_split(batch.items_T, batch.lengths_B.cumsum(0)[:-1])
    ]
    torch.testing.assert_close(model.encode(batch), torch.cat(alone))
    torch.testing.assert_close(model.encode(batch.ask_last()), torch.cat([rows[-1:] for rows in alone]))


@pytest.mark.parametrize("config", [*CONFIGS, SASRecConfig(hidden_dim=16, max_length=8)], ids=named)
def test_bf16_is_near_fp32(config: Component) -> None:
    model, batch = model_for(config), log(torch.tensor([3, 8, 1, 5]))
    exact = model.encode(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.encode(batch)
    torch.autograd.backward(rough.float().sum())
    assert float((rough.detach() - exact.detach()).norm() / exact.detach().norm()) < 0.03


def test_a_device_without_the_tiled_attention_gets_the_same() -> None:
    torch.manual_seed(0)
    qkv_TD3 = torch.randn(int(LENGTHS.sum()), 24, dtype=torch.float64, requires_grad=True)
    tiled, fused = Stream(LENGTHS), Stream(LENGTHS)
    fused_TD = fused.join([attend_fused(tile, qkv_TD3, 2, Dropout(0.0)) for tile in fused.tiles])
    tiled_TD = tiled.attend(qkv_TD3, 2, Dropout(0.0))
    torch.testing.assert_close(tiled_TD, fused_TD)
    slopes = [torch.autograd.grad(mixed_TD.sin().sum(), qkv_TD3) for mixed_TD in (tiled_TD, fused_TD)]
    torch.testing.assert_close(*slopes)
