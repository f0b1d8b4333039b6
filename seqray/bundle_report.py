"""The model card of a bundle, and where its code came from."""

import shutil
import subprocess
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from seqray.config import Config


def git_commit() -> str | None:
    """The commit of the working folder; None when it is not a git checkout."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        done = subprocess.run([git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def model_card(
    config: Config, items: pa.Table, metrics: Mapping[str, Any], about: Mapping[str, Any], has_curve: bool
) -> str:
    """README.md of a bundle: what it is, its data, the model beside the baselines, its config, how to serve it."""
    events = int(pc.sum(items.column("train_events")).as_py() or 0)
    facts = {
        "Model": f"`{config.model.type}`, trained with loss `{config.loss.type}`",
        "Run": f"`{about['run_id']}`" + (f", from `{about['parent']}`" if about["parent"] else ""),
        "Created": about["created"],
        "Items": f"{items.num_rows:,}",
        "Training events": f"{events:,}",
        "Data fingerprint": f"`{about['data_fingerprint']}`",
        "Code": f"seqray {about['seqray_version']}, PyTorch {about['torch_version']}, "
        + (f"commit `{about['git_commit']}`" if about["git_commit"] else "no git commit"),
    }
    seen = "items of the history left out" if config.evaluate.exclude_seen else "items of the history kept"
    parts = [
        f"# {config.name}",
        "A sequential recommender: a customer's history of items goes in, a ranking of the catalogue comes out.",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items())]),
        "## Metrics",
        f"Full ranking over the catalogue, {seen}; split `{config.data.split.type}`.",
        _metrics_table(metrics),
        "![Training curve](training.png)" if has_curve else "",
        "## Serving",
        "```\npython -m serve CONFIG serve.bundle=PATH_OF_THIS_FOLDER\n```",
        "`manifest.json` holds the sha256 of every file; a bundle that does not match it is refused.",
        "## Config",
        f"```yaml\n{config.yaml()}```",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metrics_table(metrics: Mapping[str, Any]) -> str:
    numbers = {key: value for key, value in metrics.items() if _is_number(value)}
    baselines = {name: row for name, row in metrics.get("baselines", {}).items() if isinstance(row, Mapping)}
    rows = {"**model**": numbers, **baselines}
    keys = [key for key in numbers if key.startswith("test/")] or list(numbers)
    if not keys:
        return "No metrics were recorded."
    lines = ["| | " + " | ".join(keys) + " |", "|---|" + "---:|" * len(keys)]
    for name, row in rows.items():
        cells = (f"{row[key]:.4f}" if _is_number(row.get(key)) else "" for key in keys)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
