"""The picture of a training run: the loss and the validation metric over the epochs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LOSS = "train/loss"
LOSS_COLOR, METRIC_COLOR, BEST_COLOR = "#3b6ea8", "#c2571a", "#7a7a7a"


def draw_training_curve(path: str | Path, curve: Sequence[Mapping[str, Any]], metric: str, title: str) -> None:
    """Writes a PNG of rows {"epoch", "train/loss", metric}; a row may lack either value."""
    figure = Figure(figsize=(8, 4), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    loss_axes = figure.add_subplot()
    metric_axes = loss_axes.twinx()
    loss_epochs, losses = _series(curve, LOSS)
    epochs, values = _series(curve, metric)
    marker = "o" if len(curve) <= 60 else ""
    lines = loss_axes.plot(loss_epochs, losses, color=LOSS_COLOR, marker=marker, markersize=3, label=LOSS)
    lines += metric_axes.plot(epochs, values, color=METRIC_COLOR, marker=marker, markersize=3, label=metric)
    if values:
        best = max(range(len(values)), key=values.__getitem__)
        label = f"best {metric} {values[best]:.4f} (epoch {epochs[best]:g})"
        lines.append(metric_axes.axvline(epochs[best], color=BEST_COLOR, linestyle=":", label=label))
    loss_axes.set_xlabel("epoch")
    loss_axes.set_ylabel(LOSS, color=LOSS_COLOR)
    metric_axes.set_ylabel(metric, color=METRIC_COLOR)
    loss_axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss_axes.grid(alpha=0.25)
    loss_axes.set_title(title)
    figure.legend(handles=lines, loc="outside lower center", ncols=3, frameon=False)
    canvas.print_png(str(path))


def _series(curve: Sequence[Mapping[str, Any]], key: str) -> tuple[list[float], list[float]]:
    rows = [row for row in curve if row.get(key) is not None]
    return [float(row["epoch"]) for row in rows], [float(row[key]) for row in rows]
