"""The code that a run is trained by, so that other code does not go on with it unnoticed."""

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

import seqray
from seqray.bundle_report import git_commit
from seqray.config import Config

SUFFIXES = (".py", ".cpp", ".cu", ".h")
MOST_LINES = 10
Code = Mapping[str, str]


def code_of(config: Config) -> dict[str, str]:
    """What stands for the code: source file -> start of its sha256, the version of torch, and the git commit.

    The files are seqray's, train's, and those of the modules that the config names.
    """
    sources: dict[str, Path] = {}
    for package in (Path(seqray.__file__).parent, Path(__file__).parent):
        sources |= _in_package(package)
    for type_ in config.component_types:
        if ":" in type_:
            sources |= _of_module(type_.partition(":")[0])
    digests = {name: hashlib.sha256(path.read_bytes()).hexdigest()[:12] for name, path in sorted(sources.items())}
    return {"commit": git_commit() or "none", "torch": torch.__version__, **digests}


def code_differences(old: Code, new: Code) -> list[str]:
    """`code: ...` for every file that changed; none for a run from before code was recorded.

    A commit alone is no difference: it may have changed nothing of this.
    """
    if not old:
        return []
    changed = [name for name in dict.fromkeys([*old, *new]) if name != "commit" and old.get(name) != new.get(name)]
    lines = [f"code: {name}: {old.get(name, 'nothing')} -> {new.get(name, 'nothing')}" for name in changed]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES], f"code: and {len(lines) - MOST_LINES} more files"]
    commits = old.get("commit"), new.get("commit")
    return [*lines, f"code: commit {commits[0]} -> {commits[1]}"] if lines and commits[0] != commits[1] else lines


def _of_module(module: str) -> dict[str, Path]:
    """The sources of a module of the user's own, with the rest of its package."""
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if spec is None or spec.origin is None:
        return {}
    path = Path(spec.origin)
    return _in_package(path.parent) if path.name == "__init__.py" else {path.name: path}


def _in_package(folder: Path) -> dict[str, Path]:
    paths: Iterable[Path] = folder.rglob("*")
    return {str(path.relative_to(folder.parent)): path for path in paths if path.suffix in SUFFIXES and path.is_file()}
