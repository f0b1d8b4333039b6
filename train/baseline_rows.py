"""Baseline metrics, computed once for each store and kept in it: every run, trial and evaluation shows them."""

import contextlib
import hashlib
import json

from seqray.command import write_json
from seqray.evaluation import evaluate_baselines
from seqray.program_config import EvaluateConfig
from seqray.sequences import SequenceStore, Split

VERSION = 2
"""To be raised when a baseline or a metric changes, so that kept numbers are not used again."""

Rows = dict[str, dict[str, float]]


def baseline_rows(store: SequenceStore, split: Split, config: EvaluateConfig) -> Rows:
    """Baseline -> metrics with keys such as `test/ndcg@10`; from the store when they were computed before."""
    decides = {
        "version": VERSION, "content": store.manifest["content_sha256"], "k": config.k, "seen": config.exclude_seen,
        "window": config.popularity_window_days,
    }  # fmt: skip
    key = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:12]
    path = store.folder / "baselines" / f"{split}-{key}.json"
    if path.exists():
        rows: Rows = json.loads(path.read_text(encoding="utf-8"))
        return rows
    rows = evaluate_baselines(store, split, config)
    with contextlib.suppress(OSError):  # a store that cannot be written to is still good to read
        write_json(path, rows)
    return rows
