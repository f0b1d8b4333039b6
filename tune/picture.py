"""The picture of a search: the metric over the trials, and over each searched value."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seqray.folder import Folder
from tune.trials import TrialRow

PICTURE_FILE = "search.png"
COLORS = {"finished": "tab:blue", "stopped early": "tab:orange", "failed": "tab:red", "interrupted": "tab:gray"}


def draw_search(search: Folder, rows: Sequence[TrialRow], monitor: str) -> Folder:
    """Writes `search.png`: the best so far over the trials, then one panel for each searched path."""
    seen = [row for row in rows if row.best >= 0]
    keys = list(dict.fromkeys(key for row in rows for key in row.sample))
    figure = Figure(figsize=(4 * (len(keys) + 1), 3.6), layout="constrained")
    first, *others = figure.subplots(1, len(keys) + 1, sharey=True, squeeze=False)[0]
    best = [max(row.best for row in seen[: end + 1]) for end in range(len(seen))]
    first.step([row.number for row in seen], best, where="post", color="tab:gray", label="best so far")
    _scatter(first, seen, [row.number for row in seen])
    first.set(xlabel="trial", ylabel=monitor)
    first.legend(fontsize="small")
    for axis, key in zip(others, keys, strict=True):
        _scatter(axis, seen, [row.sample[key] for row in seen])
        axis.set_xlabel(key)
    FigureCanvasAgg(figure)
    with tempfile.TemporaryDirectory(prefix="seqray-") as temporary:
        figure.savefig(Path(temporary) / PICTURE_FILE, dpi=110)
        search.put(Path(temporary))
    return search / PICTURE_FILE


def _scatter(axis: Axes, rows: Sequence[TrialRow], values: list[Any]) -> None:
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
    places = values if numbers else [str(value) for value in values]
    for status, color in COLORS.items():
        chosen = [index for index, row in enumerate(rows) if row.status == status]
        if chosen:
            axis.scatter([places[i] for i in chosen], [rows[i].best for i in chosen], color=color, label=status)
    if numbers and all(isinstance(value, int) for value in values):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif numbers and min(values) > 0 and max(values) > 5 * min(values):
        axis.set_xscale("log")
