"""What the tests of seqray/native share."""

import pytest
from torch import Tensor

from seqray.native.library import operators, operators_of_training

needs_kernels = pytest.mark.skipif(
    operators(build=True) is None, reason="needs a CPU with AVX2 and, the first time, a C++ compiler"
)
needs_kernels_of_training = pytest.mark.skipif(
    operators_of_training(build=True) is None,
    reason="needs a CPU with AVX-512, bf16 and VNNI and, the first time, a C++ compiler",
)


def near(mine: Tensor, its: Tensor, tolerance: float) -> bool:
    return float((mine.detach().double() - its.detach()).norm()) <= tolerance * float(its.detach().norm()) + 1e-6
