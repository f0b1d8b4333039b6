"""Local files that are on the disk when the call returns."""

import os
import uuid
from pathlib import Path


def write_and_sync(folder: Path, name: str, content: bytes) -> None:
    """Writes a file whole, in place of one of that name, and syncs it and the folder; OSError as it comes."""
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in missing:
        _sync(made.parent)
    temporary = folder / f".{name}.{uuid.uuid4().hex[:8]}"
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, folder / name)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(folder)


def _sync(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
