"""Kernels in C++ for CPUs, built at their first use; without them PyTorch does the work."""
