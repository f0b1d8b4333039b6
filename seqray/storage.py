"""Folders on a local disk or behind any pyarrow.fs URI: written as a whole, and read from a local copy.

A published folder is complete when it holds manifest.json, which is written last.
"""

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from seqray.errors import DataError
from seqray.locations import NO_SECRETS, holds_secret, is_uri, local_path

MANIFEST_FILE = "manifest.json"


def open_filesystem(uri: str | Path) -> tuple[Any, str]:
    """The pyarrow filesystem of a local path or URI, and the path on it; DataError when it cannot be reached."""
    if not is_uri(uri):
        return pafs.LocalFileSystem(), str(local_path(uri))
    if holds_secret(uri):
        raise DataError(f"{urlsplit(str(uri)).scheme}://: {NO_SECRETS}")
    try:
        filesystem, path = pafs.FileSystem.from_uri(str(uri))
    except (OSError, ValueError, ImportError, pa.ArrowException) as error:
        raise DataError(f"{uri}: cannot open this location: {error}") from error
    return filesystem, path.rstrip("/")


def temporary_folder(target: str | Path) -> Path:
    """A new empty folder to write in before `publish`: beside a local target, so that renaming it is one step."""
    if is_uri(target):
        return Path(tempfile.mkdtemp(prefix="seqray-"))
    path = local_path(target)
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise DataError(f"{target}: cannot write here: {error}") from error
    return folder


def publish(local_temp_folder: str | Path, target: str | Path) -> None:
    """Makes a finished local folder the published folder at `target`, in place of the one that was there.

    The folder is gone afterwards. DataError when the target exists and is no published folder of ours.
    """
    folder = Path(local_temp_folder)
    if not (folder / MANIFEST_FILE).is_file():
        raise DataError(f"{folder}: only a folder with {MANIFEST_FILE} can be published")
    if is_uri(target):
        upload(folder, *open_filesystem(target))
        shutil.rmtree(folder)
    else:
        _replace_folder(folder, local_path(target))


def upload(folder: Path, filesystem: Any, path: str) -> None:
    """Copies a local folder to `path` on `filesystem`, manifest last; files left from an older one are deleted."""
    manifest = f"{path}/{MANIFEST_FILE}"
    old = {info.path for info in _files(filesystem, path)}
    try:
        if old and not any(name.endswith(f"/{MANIFEST_FILE}") for name in old):
            raise DataError(f"{path}: holds files but no {MANIFEST_FILE}; not replaced, name another place")
        if old:
            filesystem.delete_file(manifest)
            filesystem.delete_dir_contents(path)
        sources = sorted((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f == folder / MANIFEST_FILE)
        for source in sources:
            destination = f"{path}/{source.relative_to(folder).as_posix()}"
            filesystem.create_dir(str(PurePosixPath(destination).parent), recursive=True)
            pafs.copy_files(str(source), destination, pafs.LocalFileSystem(), filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{manifest}: cannot be written: {error}") from error


def download(filesystem: Any, path: str, cache_folder: Path, *, verify: bool = False) -> Path:
    """The copy of the published folder `path` in the cache, made when it is not there; DataError when it is not.

    The copy is named after the manifest, so what has not changed is copied once. verify: a new copy is compared with
    the sha256 of the files that the manifest lists.
    """
    manifest = read_manifest_bytes(filesystem, path)
    if manifest is None:
        raise DataError(f"{path}: no {MANIFEST_FILE}, so nothing complete is published here")
    name = f"{PurePosixPath(path).name}-{hashlib.sha256(manifest).hexdigest()[:16]}"
    copy = cache_folder / name
    if (copy / MANIFEST_FILE).is_file():
        return copy
    temporary = temporary_folder(copy)
    try:
        for info in _files(filesystem, path):
            inner = PurePosixPath(info.path).relative_to(path)
            if ".." in inner.parts:
                raise DataError(f"{info.path}: not copied, the name leads out of the folder")
            local = temporary / inner
            local.parent.mkdir(parents=True, exist_ok=True)
            pafs.copy_files(info.path, str(local), filesystem, pafs.LocalFileSystem())
        # The writer deletes the manifest before anything else, so an unchanged one vouches for all files.
        if read_manifest_bytes(filesystem, path) != manifest:
            raise DataError(f"{path}: was replaced while it was copied; run the command again")
        if verify:
            _compare(temporary, path, manifest)
        if not (copy / MANIFEST_FILE).is_file():
            _replace_folder(temporary, copy)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be copied to {copy}: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return copy


def _compare(copy: Path, path: str, manifest: bytes) -> None:
    """DataError when a file of a copy is not what the manifest (of a store or a bundle) says."""
    try:
        content = json.loads(manifest)
        listed = dict(content.get("files") or content.get("content_sha256") or {})
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}/{MANIFEST_FILE}: cannot be read: {error}") from error
    for name, digest in listed.items():
        if not (copy / name).is_file():
            raise DataError(f"{path}: {name} is listed in {MANIFEST_FILE} but missing")
        actual = file_sha256(copy / name)
        if actual != digest:
            raise DataError(f"{path}: {name} does not match {MANIFEST_FILE}: sha256 {actual}, listed {digest}")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest_bytes(filesystem: Any, path: str) -> bytes | None:
    """The manifest of the folder `path` on `filesystem`, None when there is none."""
    try:
        with filesystem.open_input_stream(f"{path}/{MANIFEST_FILE}", compression=None) as stream:
            return bytes(stream.read())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}/{MANIFEST_FILE}: cannot be read: {error}") from error


def _replace_folder(folder: Path, target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise DataError(f"{target}: is a file; a folder is to be written here")
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise DataError(f"{target}: holds files but no {MANIFEST_FILE}; not replaced, name another place")
    aside = folder.with_name(f"{folder.name}.old")
    try:
        if target.exists():
            os.replace(target, aside)
        try:
            os.replace(folder, target)
        except OSError:
            if aside.exists():
                os.replace(aside, target)
            raise
    except OSError as error:
        raise DataError(f"{target}: cannot be written: {error}") from error
    shutil.rmtree(aside, ignore_errors=True)


def _files(filesystem: Any, path: str) -> list[Any]:
    try:
        infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be listed: {error}") from error
    return [info for info in infos if info.type == pafs.FileType.File]
