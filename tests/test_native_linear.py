"""Linear layers in C++ with what stands around them, against float64 references."""

import copy

import pytest
import torch
from kernels import near, needs_kernels_of_training
from torch import Tensor, nn
from torch.nn import functional as F

from seqray.catalogue import Catalogue
from seqray.losses import build_loss
from seqray.model_sections import ESASRecConfig, SASRecConfig
from seqray.models.dropout import Dropout
from seqray.models.protocol import build_model
from seqray.native.library import SWITCH
from seqray.native.linear import linear
from seqray.samples import Step, Targets
from seqray.sections import SoftmaxConfig
from seqray.sequences import Batch
from train.objective import Objective

CASES = [
    (100, 64, 192, "norm"), (70, 64, 64, "residual"), (999, 64, 256, "norm"), (999, 256, 64, "gelu residual"),
    (5, 50, 7, "norm residual"), (130, 7, 50, "gelu"), (1, 1, 1, "no bias"), (2000, 33, 33, "no bias residual"),
]  # fmt: skip


class Part:
    """A linear layer with its surroundings, and random input, residual and slope."""

    def __init__(self, T: int, I: int, O: int, case: str, dtype: torch.dtype = torch.float32) -> None:  # noqa: E741
        torch.manual_seed(0)
        self.layer = nn.Linear(I, O, bias="no bias" not in case)
        self.norm = nn.LayerNorm(I) if "norm" in case else None
        if self.norm is not None:
            nn.init.normal_(self.norm.weight)
            nn.init.normal_(self.norm.bias)
        self.gelu = "gelu" in case
        self.input, self.slope = torch.randn(T, I).to(dtype).requires_grad_(), torch.randn(T, O)
        self.residual = torch.randn(T, O, requires_grad=True) if "residual" in case else None

    def run(self, dropout: Dropout | None = None) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return linear(
                self.input, self.layer, norm=self.norm, gelu=self.gelu, residual_TO=self.residual, dropout=dropout
            )

    def slopes(self, output: Tensor) -> list[Tensor]:
        norm = [] if self.norm is None else list(self.norm.parameters())
        residual = [] if self.residual is None else [self.residual]
        wanted = [self.input, *self.layer.parameters(), *norm, *residual]
        return list(torch.autograd.grad(output, wanted, self.slope.to(output.dtype)))

    def exact(self, mask: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Output and slopes in float64."""
        part = copy.deepcopy(self)
        part.layer.double()
        part.input = part.input.detach().double().requires_grad_()
        prepared = F.gelu(part.input) if part.gelu else part.input
        if part.norm is not None:
            prepared = part.norm.double()(prepared)
        output = part.layer(prepared) if mask is None else part.layer(prepared) * mask
        if part.residual is not None:
            part.residual = part.residual.detach().double().requires_grad_()
            output = output + part.residual
        return output, part.slopes(output)


@needs_kernels_of_training
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "I", "O", "case"), CASES)
def test_linear_is_what_its_formula_says(T: int, I: int, O: int, case: str, dtype: torch.dtype) -> None:  # noqa: E741
    part = Part(T, I, O, case, dtype)
    output, (expected, slopes) = part.run(), part.exact()
    assert output.dtype == (torch.float32 if "residual" in case else torch.bfloat16)
    assert near(output, expected, 5e-3)
    for mine, its in zip(part.slopes(output), slopes, strict=True):
        assert near(mine, its, 7e-3)


@needs_kernels_of_training
@pytest.mark.parametrize(("T", "I", "O", "case"), CASES)
def test_linear_without_the_kernels_is_the_same(
    T: int, I: int, O: int, case: str, monkeypatch: pytest.MonkeyPatch  # noqa: E741
) -> None:  # fmt: skip
    part = Part(T, I, O, case)
    mine = part.run()
    slopes = part.slopes(mine)
    monkeypatch.setenv(SWITCH, "off")
    other = part.run()
    assert other.dtype == mine.dtype
    assert near(mine, other.double(), 1e-2)
    assert all(near(a, b.double(), 2e-2) for a, b in zip(slopes, part.slopes(other), strict=True))


@needs_kernels_of_training
@pytest.mark.parametrize(("T", "I", "O", "case"), CASES)
def test_linear_drops_its_share_and_keeps_its_slopes(T: int, I: int, O: int, case: str) -> None:  # noqa: E741
    part, dropout = Part(T, I, O, f"{case} residual"), Dropout(0.3).train()
    ones = Part(T, I, O, "residual")
    with torch.no_grad():
        ones.layer.weight.zero_()
        ones.layer.bias.fill_(1)
        assert ones.residual is not None
        ones.residual.zero_()
    torch.manual_seed(3)
    mask = ones.run(dropout).detach().double()
    assert {round(float(value), 4) for value in mask.unique()} <= {0.0, round(1 / 0.7, 4)}
    assert abs(float((mask > 0).double().mean()) - 0.7) < 5 * (0.21 / mask.numel()) ** 0.5
    torch.manual_seed(3)
    output, (expected, slopes) = part.run(dropout), part.exact(mask)
    assert near(output, expected, 5e-3)
    for mine, its in zip(part.slopes(output), slopes, strict=True):
        assert near(mine, its, 7e-3)


@needs_kernels_of_training
def test_linear_does_not_depend_on_threads_and_leaves_frozen_weights_alone() -> None:
    part, threads, results = Part(2000, 64, 256, "norm"), torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        torch.manual_seed(1)
        output = part.run(Dropout(0.2).train())
        results.append([output, *part.slopes(output)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
    part.layer.weight.requires_grad_(False)
    torch.autograd.backward(part.run().sum())
    assert part.layer.weight.grad is None and part.layer.bias.grad is not None


@needs_kernels_of_training
@pytest.mark.parametrize("name", ["sasrec", "esasrec"])
def test_a_narrow_model_trains_in_bf16_by_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = SASRecConfig(dropout=0.0) if name == "sasrec" else ESASRecConfig(dropout=0.0)
    torch.manual_seed(0)
    model = build_model(config, Catalogue(50)).train()
    lengths_B = torch.tensor([3, 50, 7, 1])
    batch = Batch(torch.randint(1, 51, (61,)), lengths_B)
    step = Step(batch, Targets(torch.randint(1, 51, (61,)), None, torch.arange(61)), 1, 61, 61)
    results = []
    for precision, switch in (("auto", ""), ("auto", "off"), ("fp32", "")):
        monkeypatch.setenv(SWITCH, switch)
        objective = Objective(model, build_loss(SoftmaxConfig()), 50, precision)  # type: ignore[arg-type]
        loss = objective(step, (0, 0, 0))
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for others in results[:2]:
        for mine, its in zip(others, results[2], strict=True):
            assert near(mine, its.double(), 3e-2)
    assert not torch.equal(results[0][-1], results[1][-1])
