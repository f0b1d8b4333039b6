"""Attention in C++ against a float64 reference."""

import pytest
import torch
from kernels import needs_kernels_of_training
from torch import Tensor

from seqray.models.dropout import Dropout
from seqray.models.stream import Stream
from seqray.native.library import SWITCH

LENGTHS = torch.tensor([3, 150, 1, 4, 8, 8, 2, 33, 32, 31, 128, 200])


def plain_attention(qkv_TD3: Tensor, lengths_B: Tensor, num_heads: int, kept: list[Tensor] | None = None) -> Tensor:
    """Sequence by sequence in the type of the input; `kept`: (H, L, L) that the chances of each are multiplied by."""
    mixed = []
    for index, rows in enumerate(torch.tensor_split(qkv_TD3, lengths_B.cumsum(0)[:-1])):
        q, k, v = rows.view(len(rows), 3, num_heads, -1).permute(1, 2, 0, 3)
        later = torch.ones(len(rows), len(rows), dtype=torch.bool).triu(1)
        chance = (q @ k.mT * q.shape[2] ** -0.5).masked_fill(later, -torch.inf).softmax(2)
        mixed.append(((chance if kept is None else chance * kept[index]) @ v).transpose(0, 1).flatten(1))
    return torch.cat(mixed)


def masks(lengths_B: Tensor, num_heads: int, dropout: Dropout, seed: int) -> list[Tensor]:
    """What the kernel multiplies the chances by, read off values that are unit vectors and chances that are equal."""
    found, longest = [], int(lengths_B.max())
    D, T = num_heads * longest, int(lengths_B.sum())
    qkv_TD3 = torch.zeros(T, 3 * D)
    place_T = Stream(lengths_B).order_T
    for head in range(num_heads):
        qkv_TD3[torch.arange(T), 2 * D + head * longest + place_T] = 1
    torch.manual_seed(seed)
    mixed_TD = Stream(lengths_B).attend(qkv_TD3, num_heads, dropout)
    for rows in torch.tensor_split(mixed_TD, lengths_B.cumsum(0)[:-1]):
        L = len(rows)
        share = rows.view(L, num_heads, longest)[:, :, :L].transpose(0, 1)
        found.append((share * torch.arange(1, L + 1).view(1, L, 1)).double())
    return found


@needs_kernels_of_training
@pytest.mark.parametrize(("num_heads", "D"), [(1, 64), (2, 24), (3, 150), (1, 1)])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_attention_is_what_its_formula_says(num_heads: int, D: int, rate: float) -> None:
    torch.manual_seed(0)
    exact_TD3 = torch.randn(int(LENGTHS.sum()), 3 * D, dtype=torch.float64, requires_grad=True)
    qkv_TD3 = exact_TD3.detach().float().requires_grad_()
    slope_TD = torch.randn(len(qkv_TD3), D)
    dropout = Dropout(rate).train()
    expected_TD = plain_attention(
        exact_TD3, LENGTHS, num_heads, masks(LENGTHS, num_heads, dropout, 5) if rate else None
    )
    torch.manual_seed(5)
    mixed_TD = Stream(LENGTHS).attend(qkv_TD3, num_heads, dropout)
    torch.testing.assert_close(mixed_TD.double(), expected_TD, rtol=1e-5, atol=1e-5)
    (slope_TD3,) = torch.autograd.grad(mixed_TD, qkv_TD3, slope_TD)
    (exact_slope_TD3,) = torch.autograd.grad(expected_TD, exact_TD3, slope_TD.double())
    torch.testing.assert_close(slope_TD3.double(), exact_slope_TD3, rtol=1e-4, atol=1e-5)


@needs_kernels_of_training
@pytest.mark.parametrize("length", [*range(1, 40), 63, 64, 65, 127, 128, 129, 199, 200])
def test_attention_of_every_length(length: int) -> None:
    torch.manual_seed(length)
    lengths_B = torch.tensor([length, 7, length])
    exact_TD3 = 3 * torch.randn(int(lengths_B.sum()), 48, dtype=torch.float64)
    exact_TD3.requires_grad_()
    qkv_TD3 = exact_TD3.detach().float().requires_grad_()
    mixed_TD, expected_TD = Stream(lengths_B).attend(qkv_TD3, 2, Dropout(0.0)), plain_attention(exact_TD3, lengths_B, 2)
    torch.testing.assert_close(mixed_TD.double(), expected_TD, rtol=1e-5, atol=1e-5)
    slopes = [
        torch.autograd.grad(mixed.sin().sum(), of)[0] for mixed, of in ((mixed_TD, qkv_TD3), (expected_TD, exact_TD3))
    ]
    torch.testing.assert_close(slopes[0].double(), slopes[1], rtol=1e-4, atol=1e-4)


@needs_kernels_of_training
def test_attention_drops_its_share_of_pairs_and_each_for_itself() -> None:
    lengths_B = torch.full((12,), 100)
    found = torch.cat([(kept > 0).float().flatten(1) for kept in masks(lengths_B, 2, Dropout(0.25).train(), 3)], 1)
    pairs = 12 * 100 * 101 / 2
    assert found.sum(1).sub(0.75 * pairs).abs().max() < 5 * (0.25 * 0.75 * pairs) ** 0.5
    both = (found[0] * found[1]).sum()
    assert abs(both - 0.75**2 * pairs) < 5 * (0.5625 * 0.4375 * pairs) ** 0.5  # the heads know nothing of each other
    seen = masks(lengths_B, 2, Dropout(0.25).train(), 3)
    assert all(torch.equal(*pair) for pair in zip(seen, masks(lengths_B, 2, Dropout(0.25).train(), 3), strict=True))
    assert not torch.equal(seen[0], masks(lengths_B, 2, Dropout(0.25).train(), 4)[0])


@needs_kernels_of_training
def test_attention_does_not_depend_on_threads() -> None:
    torch.manual_seed(0)
    qkv_TD3, threads, results = torch.randn(int(LENGTHS.sum()), 96, requires_grad=True), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        mixed_TD = Stream(LENGTHS).attend(qkv_TD3, 2, Dropout(0.2).train())
        results.append((mixed_TD, torch.autograd.grad(mixed_TD.sin().sum(), qkv_TD3)[0]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@needs_kernels_of_training
def test_attention_without_the_kernels_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    qkv_TD3, results = torch.randn(int(LENGTHS.sum()), 96, requires_grad=True), []
    for switch in ("", "off"):
        monkeypatch.setenv(SWITCH, switch)
        mixed_TD = Stream(LENGTHS).attend(qkv_TD3, 2, Dropout(0.2).eval())
        results.append((mixed_TD, torch.autograd.grad(mixed_TD.sin().sum(), qkv_TD3)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@needs_kernels_of_training
def test_attention_reads_bf16() -> None:
    torch.manual_seed(0)
    qkv_TD3 = torch.randn(int(LENGTHS.sum()), 96).bfloat16().requires_grad_()
    mixed_TD = Stream(LENGTHS).attend(qkv_TD3, 2, Dropout(0.0))
    expected_TD = plain_attention(qkv_TD3.double(), LENGTHS, 2)
    assert mixed_TD.dtype == torch.bfloat16
    torch.testing.assert_close(mixed_TD.double(), expected_TD, rtol=1e-2, atol=1e-2)
    (slope_TD3,) = torch.autograd.grad(mixed_TD.sum(), qkv_TD3)
    assert slope_TD3.dtype == torch.bfloat16 and slope_TD3.isfinite().all()
