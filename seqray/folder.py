"""Folder: the same few verbs for a folder on a local disk and for one behind a URI, such as s3://bucket/seqray."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from seqray.durable import write_and_sync
from seqray.errors import DataError
from seqray.exclusive import create_file, create_object
from seqray.locations import is_uri, join, local_path
from seqray.storage import open_filesystem


@dataclass(frozen=True)
class Folder:
    """A folder that may not be there yet; its files are small ones, read and written as a whole.

    A local file gets its name when it is complete, and an object store shows an object when it is complete, so that a
    reader sees the old content or the new one. Errors: DataError names the file.
    """

    location: str
    """Path from the root, or URI."""

    @classmethod
    def at(cls, location: str | os.PathLike[str]) -> "Folder":
        """The folder at a URI, or at a local path, which may be relative to the working folder."""
        text = os.fspath(location)
        return cls(text if is_uri(text) else str(local_path(text).absolute()))

    def __str__(self) -> str:
        return self.location

    def __truediv__(self, name: str) -> "Folder":
        child = Folder(join(self.location, name))
        if "_opened" in vars(self):  # opening asks the object store where the bucket is
            filesystem, path = self._opened
            vars(child)["_opened"] = (filesystem, f"{path}/{name}")
        return child

    @property
    def name(self) -> str:
        """The last part of its path."""
        return PurePosixPath(self._opened[1]).name

    @property
    def is_local(self) -> bool:
        """Whether it is on a file system of this machine."""
        return not is_uri(self.location)

    @property
    def path(self) -> Path:
        """The local path; of a local folder only."""
        assert self.is_local
        return Path(self.location)

    def read_text(self, name: str) -> str | None:
        """The content of a file, None when there is none."""
        filesystem, path = self._opened
        with self._errors(name, "read"):
            try:
                with filesystem.open_input_stream(f"{path}/{name}", compression=None) as stream:
                    return bytes(stream.read()).decode("utf-8")
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write_text(self, name: str, text: str) -> None:
        """Puts the content in place of what was there."""
        filesystem, path = self._opened
        with self._errors(name, "written"):
            filesystem.create_dir(path, recursive=True)
            target = f"{path}/{name}"
            temporary = f"{path}/.{name}.{uuid.uuid4().hex[:8]}" if self.is_local else target
            with filesystem.open_output_stream(temporary, compression=None) as stream:
                stream.write(text.encode("utf-8"))
            if temporary != target:
                os.replace(temporary, target)

    def create_text(self, name: str, text: str) -> bool:
        """Writes a file that is not there yet, whole; false, and nothing changed, where there is one.

        Of several writers of a name one gets true. `text` has to be unique to the writer; see `seqray.exclusive`.
        """
        content = text.encode("utf-8")
        with self._errors(name, "created"):
            if self.is_local:
                return create_file(self.path / name, content)
            return create_object(join(self.location, name), content, getattr(self._opened[0], "region", None))

    def num_bytes(self) -> int:
        """The size of all its files, those of its folders too; 0 when it is not there."""
        filesystem, path = self._opened
        with self._errors("", "listed"):
            infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
            return sum(int(info.size) for info in infos if info.type == pafs.FileType.File)

    def write_durably(self, name: str, content: bytes) -> None:
        """Puts the content in place; when this returns it outlives the process and, on a disk, the power."""
        filesystem, path = self._opened
        with self._errors(name, "written"):
            if self.is_local:
                write_and_sync(self.path, name, content)
            else:
                with filesystem.open_output_stream(f"{path}/{name}", compression=None) as stream:
                    stream.write(content)

    def delete(self, name: str) -> None:
        """Deletes a file; one that is not there is no error."""
        filesystem, path = self._opened
        with self._errors(name, "deleted"), suppress(FileNotFoundError):
            filesystem.delete_file(f"{path}/{name}")

    def names(self) -> list[str]:
        """What lies directly in it, sorted; nothing when it is not there."""
        filesystem, path = self._opened
        with self._errors("", "listed"):
            infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
            return sorted(PurePosixPath(info.path).name for info in infos)

    def clear(self) -> None:
        """Deletes what lies in it."""
        filesystem, path = self._opened
        with self._errors("", "emptied"):
            filesystem.delete_dir_contents(path, missing_dir_ok=True)

    def put(self, source: Path) -> None:
        """Adds the files of a local folder, those of its folders too."""
        filesystem, path = self._opened
        with self._errors("", "written"):
            for file in sorted(file for file in source.rglob("*") if file.is_file()):
                target = PurePosixPath(path) / file.relative_to(source).as_posix()
                filesystem.create_dir(str(target.parent), recursive=True)
                pafs.copy_files(str(file), str(target), pafs.LocalFileSystem(), filesystem)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        return open_filesystem(self.location)

    @contextmanager
    def _errors(self, name: str, verb: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
            raise DataError(f"{join(self.location, name)}: cannot be {verb}: {error}") from error
