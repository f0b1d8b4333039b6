"""Memory of the process on a CPU."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**30


def keep_freed_memory() -> None:
    """Lets glibc keep blocks of up to 1 GiB that were freed, instead of giving them back to the kernel.

    Each step takes and frees the same large tensors. From fresh pages a product over the catalogue takes several times
    as long, since the kernel clears every page again. Does nothing where the C library has no mallopt.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST)
    mallopt(M_TRIM_THRESHOLD, 2 * LARGEST - 1)
