"""Kernels in C++ for training on CPUs with AVX-512 and bf16, built at their first use; without them Python does it."""
