"""Where each user's training part ends and where the targets of validation and test are.

Positions count from the user's own first event, as in `seqray.sequences.SequenceStore`. Shapes: U users, E events.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

import numpy as np
import numpy.typing as npt

from seqray.data_config import SplitConfig
from seqray.errors import DataError
from seqray.interactions import Interactions

IntArray = npt.NDArray[np.int64]

MIN_LEAVE_ONE_OUT = 3


@dataclass(frozen=True)
class SplitPositions:
    """Training is history[:train_end]; targets are history[start:end], and no target has start == end."""

    train_end: IntArray
    val_start: IntArray
    val_end: IntArray
    test_start: IntArray
    test_end: IntArray


def split_positions(events: Interactions, config: SplitConfig) -> SplitPositions:
    """The split of ordered events; DataError when a cut is outside the log or nothing is left to train on."""
    if config.type == "leave_one_out":
        positions = _leave_one_out(np.diff(events.offsets()))
    else:
        positions = _temporal(events, *_cuts(events.timestamps_E, config), config.target)
    if not positions.train_end.any():
        raise DataError("data.split: no training events are left")
    return positions


def _leave_one_out(length_U: IntArray) -> SplitPositions:
    has = (length_U >= MIN_LEAVE_ONE_OUT).astype(np.int64)
    return SplitPositions(
        train_end=length_U - 2 * has,
        val_start=length_U - 2 * has,
        val_end=length_U - has,
        test_start=length_U - has,
        test_end=length_U,
    )


def _temporal(
    events: Interactions, validation_cut: int, test_cut: int, target: Literal["next_item", "next_basket"]
) -> SplitPositions:
    offsets = events.offsets()
    begin, length = offsets[:-1], np.diff(offsets)
    ends = events.basket_ends() if target == "next_basket" else np.arange(len(events)) + 1
    before_validation = np.add.reduceat((events.timestamps_E < validation_cut).astype(np.int64), begin)
    before_test = np.add.reduceat((events.timestamps_E < test_cut).astype(np.int64), begin)

    def target_end(start: IntArray, stop: IntArray) -> IntArray:
        has = (start > 0) & (start < stop)
        return np.where(has, ends[np.where(has, begin + start, 0)] - begin, start)

    return SplitPositions(
        train_end=before_validation,
        val_start=before_validation,
        val_end=target_end(before_validation, before_test),
        test_start=before_test,
        test_end=target_end(before_test, length),
    )


def _cuts(timestamps_E: IntArray, config: SplitConfig) -> tuple[int, int]:
    first, last = int(timestamps_E.min()), int(timestamps_E.max())
    if config.test_cut is not None and config.validation_cut is not None:
        cuts = {"validation_cut": _microseconds(config.validation_cut), "test_cut": _microseconds(config.test_cut)}
        for name, cut in cuts.items():
            if not first < cut <= last:
                raise DataError(
                    f"data.split.{name}: {iso_time(cut)} leaves nothing on one side; "
                    f"the log's times are {iso_time(first)} to {iso_time(last)}"
                )
        validation, test = cuts.values()
    else:
        fraction = config.test_fraction or 0.0
        validation, test = (_newest(timestamps_E, share) for share in (2 * fraction, fraction))
    if not first < validation < test:
        raise DataError(
            f"data.split: training before {iso_time(validation)}, validation before {iso_time(test)}: one of them is "
            f"empty; the log's times are {iso_time(first)} to {iso_time(last)}"
        )
    return validation, test


def _newest(timestamps_E: IntArray, share: float) -> int:
    # The time at which the newest share of the events begins.
    position = min(max(len(timestamps_E) - round(share * len(timestamps_E)), 0), len(timestamps_E) - 1)
    return int(np.partition(timestamps_E, position)[position])


def _microseconds(time: datetime) -> int:
    zoned = time if time.tzinfo else time.replace(tzinfo=UTC)
    return int(np.datetime64(zoned.astimezone(UTC).replace(tzinfo=None), "us").astype(np.int64))


def iso_time(microseconds: int) -> str:
    """ISO 8601 in UTC; years beyond 9999, which come from a wrong timestamp_unit, are written too."""
    return str(np.datetime64(microseconds, "us")).removesuffix(".000000") + "Z"
