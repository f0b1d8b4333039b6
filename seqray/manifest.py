"""manifest.json: the sha256 of every file of a folder, so that a folder is used whole and unchanged or not at all."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from seqray.errors import BundleError, SeqrayError
from seqray.storage import MANIFEST_FILE, file_sha256

FORMAT_VERSION = 1
PICKLE_SUFFIXES = frozenset({".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib", ".npz", ".dill"})
ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")


def write_manifest(folder: str | Path, extra: Mapping[str, Any], files: Iterable[str]) -> dict[str, Any]:
    """Writes manifest.json with `extra`, the format version and the sha256 of `files` (names in `folder`)."""
    folder = Path(folder)
    digests = {name: file_sha256(folder / name) for name in sorted(files)}
    manifest = {"format_version": FORMAT_VERSION, **extra, "files": digests}
    temporary = folder / f".{MANIFEST_FILE}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, folder / MANIFEST_FILE)
    return manifest


def verify_manifest(folder: str | Path, error: type[SeqrayError] = BundleError) -> dict[str, Any]:
    """The manifest of `folder` after every file was checked against it.

    Raises `error`, naming the folder and the file, for a file that is missing, changed or not listed, a subfolder,
    a link, and anything that is a pickle or looks like one.
    """
    folder = Path(folder)
    manifest = _read(folder, error)
    listed = manifest["files"]
    found = sorted(entry.name for entry in os.scandir(folder))
    for name in found:
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise error(f"{folder}: {name} is not a plain file")
        if _looks_like_pickle(path):
            raise error(f"{folder}: {name} is a pickle or looks like one; pickles are never read")
        if name != MANIFEST_FILE and name not in listed:
            raise error(f"{folder}: {name} is not listed in {MANIFEST_FILE}")
    for name, digest in listed.items():
        if name not in found:
            raise error(f"{folder}: {name} is listed in {MANIFEST_FILE} but missing")
        actual = file_sha256(folder / name)
        if actual != digest:
            raise error(f"{folder}: {name} does not match {MANIFEST_FILE}: sha256 {actual}, listed {digest}")
    return manifest


def _read(folder: Path, error: type[SeqrayError]) -> dict[str, Any]:
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise error(f"{folder}: no such folder")
    if path.is_symlink():
        raise error(f"{folder}: {MANIFEST_FILE} is not a plain file")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise error(f"{folder}: {MANIFEST_FILE} is missing") from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{folder}: {MANIFEST_FILE} cannot be read: {problem}") from problem
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise error(f"{folder}: {MANIFEST_FILE}: format_version is {version!r}, this program reads {FORMAT_VERSION}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(isinstance(digest, str) for digest in files.values()):
        raise error(f"{folder}: {MANIFEST_FILE}: files is not a mapping of names to sha256")
    return dict(manifest)


def _looks_like_pickle(path: Path) -> bool:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(ZIP_STARTS):
        return True
    # Protocols 2 to 5 start with 0x80 and their number. So can a safetensors file, which starts with the 8-byte
    # length of its header; but then the header's brace follows.
    pickle = len(start) > 1 and start[0] == 0x80 and 2 <= start[1] <= 5
    return pickle and not (path.suffix == ".safetensors" and start[8:] == b"{")
