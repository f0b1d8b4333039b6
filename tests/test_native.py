"""The kernels in C++ against float64 references, and that everything works without them."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from seqray.losses import build_loss
from seqray.models.dropout import Dropout
from seqray.models.protocol import Prediction
from seqray.models.stream import Stream
from seqray.native import library
from seqray.native.library import SWITCH, operators
from seqray.negatives import Negatives
from seqray.samples import Targets
from seqray.sections import SoftmaxConfig

LENGTHS = torch.tensor([3, 150, 1, 4, 8, 8, 2, 33, 32, 31, 128, 200])
ROOT = Path(__file__).parent.parent

needs_kernels = pytest.mark.skipif(
    operators(build=True) is None, reason="needs a CPU with AVX-512 and bf16 and, the first time, a C++ compiler"
)


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


def loss_parts(case: str, rows: int, items: int, D: int) -> tuple[Tensor, Tensor, Targets]:
    """Hidden states, weights and targets: several a row or none, weighted."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, D, generator=generator).requires_grad_()
    weights = torch.randn(items, D, generator=generator).requires_grad_()
    count = 2 * rows if "baskets" in case else rows
    rows_S = torch.randint(0, rows, (count,), generator=generator).sort().values if "baskets" in case else None
    weights_S = torch.rand(count, generator=generator) * 2 if "weighted" in case else None
    items_S = torch.randint(1, items, (count,), generator=generator)
    return hidden, weights, Targets(items_S, rows_S, torch.arange(count), weights_S)


def softmax(hidden: Tensor, weights: Tensor, targets: Targets, chunk_elements: int | None = None) -> Tensor:
    loss = build_loss(SoftmaxConfig(chunk_elements=chunk_elements))
    with torch.autocast("cpu", torch.bfloat16):
        return loss(Prediction(hidden, weights), targets, Negatives((0, 0, 0), len(weights) - 1, targets))


def plain_loss(hidden: Tensor, weights: Tensor, targets: Targets) -> Tensor:
    score_SV = hidden @ weights.T
    score_SV = score_SV if targets.rows_S is None else score_SV[targets.rows_S]
    loss_S = F.cross_entropy(score_SV[:, 1:], targets.items_S - 1, reduction="none")
    return loss_S.sum() if targets.weights_S is None else loss_S @ targets.weights_S.double()


@needs_kernels
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


@needs_kernels
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


@needs_kernels
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


@needs_kernels
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


@needs_kernels
def test_attention_without_the_kernels_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    qkv_TD3, results = torch.randn(int(LENGTHS.sum()), 96, requires_grad=True), []
    for switch in ("", "off"):
        monkeypatch.setenv(SWITCH, switch)
        mixed_TD = Stream(LENGTHS).attend(qkv_TD3, 2, Dropout(0.2).eval())
        results.append((mixed_TD, torch.autograd.grad(mixed_TD.sin().sum(), qkv_TD3)[0]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_attention_reads_bf16() -> None:
    torch.manual_seed(0)
    qkv_TD3 = torch.randn(int(LENGTHS.sum()), 96).bfloat16().requires_grad_()
    mixed_TD = Stream(LENGTHS).attend(qkv_TD3, 2, Dropout(0.0))
    expected_TD = plain_attention(qkv_TD3.double(), LENGTHS, 2)
    assert mixed_TD.dtype == torch.bfloat16
    torch.testing.assert_close(mixed_TD.double(), expected_TD, rtol=1e-2, atol=1e-2)
    (slope_TD3,) = torch.autograd.grad(mixed_TD.sum(), qkv_TD3)
    assert slope_TD3.dtype == torch.bfloat16 and slope_TD3.isfinite().all()


@needs_kernels
@pytest.mark.parametrize("case", ["", "baskets", "baskets weighted", "weighted"])
@pytest.mark.parametrize("chunk_elements", [1, None])
@pytest.mark.parametrize(
    ("rows", "items", "D"), [(37, 23, 8), (1, 2, 1), (200, 600, 64), (64, 256, 50), (65, 513, 130)]
)
def test_cross_entropy_equals_the_plain_form(
    case: str, chunk_elements: int | None, rows: int, items: int, D: int
) -> None:
    hidden, weights, targets = loss_parts(case, rows, items, D)
    exact = [part.detach().bfloat16().double().requires_grad_() for part in (hidden, weights)]
    expected = plain_loss(*exact, targets)
    loss = softmax(hidden, weights, targets, chunk_elements)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    slopes, exact_slopes = torch.autograd.grad(3 * loss, (hidden, weights)), torch.autograd.grad(3 * expected, exact)
    for mine, its in zip(slopes, exact_slopes, strict=True):
        assert float((mine.double() - its).norm()) <= 5e-3 * float(its.norm()) + 2e-2


@needs_kernels
def test_cross_entropy_of_logits_that_rise_and_fall_far() -> None:
    hidden, weights, targets = loss_parts("", 100, 1000, 16)
    with torch.no_grad():
        weights[700] *= 60  # far above the first tile for some rows, far below for others
        weights[30] *= 40
    exact = [part.detach().bfloat16().double().requires_grad_() for part in (hidden, weights)]
    loss, expected = softmax(hidden, weights, targets), plain_loss(*exact, targets)
    assert float((hidden @ weights[700]).detach().abs().max()) > 150
    torch.testing.assert_close(loss.double(), expected, rtol=1e-3, atol=1e-3)
    for mine, its in zip(
        torch.autograd.grad(loss, (hidden, weights)), torch.autograd.grad(expected, exact), strict=True
    ):
        assert float((mine.double() - its).norm() / its.norm()) < 1e-2


@needs_kernels
def test_cross_entropy_does_not_depend_on_threads_and_passes_nan_on() -> None:
    hidden, weights, targets = loss_parts("baskets", 500, 2000, 32)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        loss = softmax(hidden, weights, targets, 2000 * 128)
        results.append([loss, *torch.autograd.grad(loss, (hidden, weights))])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    with torch.no_grad():
        hidden[3, 3] = torch.nan
    assert softmax(hidden, weights, targets).isnan()


@needs_kernels
def test_cross_entropy_refuses_a_target_beyond_the_catalogue() -> None:
    hidden, weights, _ = loss_parts("", 4, 8, 4)
    with pytest.raises(RuntimeError, match="a target beyond the logits"):
        softmax(hidden, weights, Targets(torch.tensor([1, 2, 3, 99]), None, torch.arange(4)))


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler-anywhere"])
def test_without_a_compiler_training_goes_on(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(library, "_fits", lambda: True)
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "made" / "kernels.so")
    library._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert operators(build=True) is None
                mixed_TD = Stream(LENGTHS).attend(
                    torch.randn(int(LENGTHS.sum()), 6, requires_grad=True), 1, Dropout(0.0)
                )
                mixed_TD.sum().backward()
    finally:
        library._load.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "training goes on without them" in caplog.text
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"lock"}


@needs_kernels
def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    script = "import torch; from seqray.native.library import operators; assert operators(build=True) is not None"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) for _ in range(3)]
    assert [process.wait(timeout=200) for process in running] == [0, 0, 0]
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"lock", "kernels.so"}


def test_nothing_is_built_before_something_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "made" / "kernels.so")
    with torch.no_grad():
        Stream(LENGTHS).attend(torch.randn(int(LENGTHS.sum()), 6, requires_grad=True), 1, Dropout(0.0))
    Stream(LENGTHS).attend(torch.randn(int(LENGTHS.sum()), 6), 1, Dropout(0.0))
    assert list(tmp_path.iterdir()) == []
