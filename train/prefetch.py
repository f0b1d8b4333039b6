"""Batches made ahead of time, so that an accelerator does not wait for them."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Made = TypeVar("Made")


def prefetched(make: Callable[[int], Made], numbers: range, ahead: bool) -> Iterator[Made]:
    """make(number) for each number, in order; `ahead`: the next one is made in a thread while this one is worked on."""
    if not ahead or not numbers:
        yield from map(make, numbers)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        coming = pool.submit(make, numbers[0])
        for number in numbers[1:]:
            made = coming.result()
            coming = pool.submit(make, number)
            yield made
        yield coming.result()
