"""What the tests of seqray/native share."""

import pytest
from torch import Tensor

from seqray.native.library import operators

needs_kernels = pytest.mark.skipif(
    operators(build=True) is None, reason="needs a CPU with AVX-512 and bf16 and, the first time, a C++ compiler"
)


def near(mine: Tensor, its: Tensor, tolerance: float) -> bool:
    return float((mine.detach().double() - its.detach()).norm()) <= tolerance * float(its.detach().norm()) + 1e-6
