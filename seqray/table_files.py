"""Files of tables: finding them under a path, and reading chosen columns of Parquet, CSV and JSONL."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.json as pajson
import pyarrow.parquet as pq

from seqray.errors import DataError
from seqray.locations import is_uri
from seqray.storage import open_filesystem

Format = Literal["parquet", "csv", "jsonl"]
SUFFIXES: dict[str, Format] = {
    ".parquet": "parquet",
    ".pq": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
JSON_SAMPLE_BYTES = 1 << 20
CSV = pacsv.ParseOptions(newlines_in_values=True)


@dataclass(frozen=True)
class TableFile:
    """One file of a log or item table."""

    filesystem: Any
    path: str
    """The path on the filesystem."""
    name: str
    """The path as messages and fingerprints name it."""
    format: Format
    size: int
    """Bytes."""
    modified_ns: int
    """Time of the last change, nanoseconds since 1970; 0 where the filesystem has none."""

    def is_there(self) -> bool:
        """Whether it still is; DataError when that cannot be told."""
        try:
            return bool(self.filesystem.get_file_info(self.path).type != pafs.FileType.NotFound)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{self.name}: cannot be looked for: {error}") from error


def find_files(paths: str | Sequence[str], format_: Format | None = None) -> list[TableFile]:
    """The files under one or several paths or URIs, folders recursively and by name, all of one format.

    In a folder, names that begin with a dot or an underscore are left out.
    """
    found = [file for path in ([paths] if isinstance(paths, str) else paths) for file in _find(path, format_)]
    odd = next((file for file in found if file.format != found[0].format), None)
    if odd is not None:
        raise DataError(
            f"{odd.name}: is {odd.format} but {found[0].name} is {found[0].format}; "
            "one format at a time (name the file, or state data.format)"
        )
    return found


def _find(path: str, format_: Format | None) -> list[TableFile]:
    filesystem, inner = open_filesystem(path)
    try:
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            raise DataError(f"{path}: no such file or folder")
        infos = [info]
        if info.type == pafs.FileType.Directory:
            infos = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
            infos = sorted((i for i in infos if _counts(i, inner)), key=lambda i: str(i.path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be listed: {error}") from error
    if not infos:
        raise DataError(f"{path}: no files in this folder")
    scheme = path.partition("://")[0] + "://" if is_uri(path) else ""
    return [
        TableFile(filesystem, i.path, scheme + i.path, format_ or _format(scheme + i.path), i.size, i.mtime_ns or 0)
        for i in infos
    ]


def _counts(info: Any, folder: str) -> bool:
    below = str(info.path)[len(folder) :].split("/")
    return info.type == pafs.FileType.File and not any(part.startswith((".", "_")) for part in below)


def _format(name: str) -> Format:
    path = PurePosixPath(name.lower())
    suffix = PurePosixPath(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in SUFFIXES:
        raise DataError(f"{name}: unknown kind of file; choices: {', '.join(SUFFIXES)}, or state the format")
    return SUFFIXES[suffix]


def read_columns(file: TableFile, columns: Sequence[str] | None, as_text: Sequence[str] = ()) -> Any:
    """An Arrow table of `columns` (all when None); DataError names the file and the columns that it lacks.

    CSV columns in `as_text` are read as text, and only the empty field is null in them; JSONL text in them stays
    text even where it looks like a time. Parquet columns have the types of the file.
    """
    read = {"parquet": _read_parquet, "csv": _read_csv, "jsonl": _read_jsonl}[file.format]
    wanted = None if columns is None else list(dict.fromkeys(columns))
    try:
        table = read(file, wanted, as_text)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error
    return table if wanted is None else table.select(wanted)


def as_array(column: Any) -> Any:
    """A column of a table as one Arrow array, decoded if it was a dictionary, with text as large_string."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_string(column.type) or pa.types.is_string_view(column.type):
        column = column.cast(pa.large_string())  # string holds 2 GB at the most
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def flat_values(column: Any) -> tuple[npt.NDArray[np.int64], Any]:
    """(row of the table, value) of every value of an Arrow array; lists, also nested, are laid end to end."""
    rows = np.arange(len(column))
    while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        rows = rows[pc.list_parent_indices(column).to_numpy()]
        column = as_array(pc.list_flatten(column))
    return rows, column


def num_rows(file: TableFile) -> int:
    """The rows of a Parquet file, from its footer alone."""
    try:
        with file.filesystem.open_input_file(file.path) as source:
            return int(pq.ParquetFile(source).metadata.num_rows)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def column_names(file: TableFile) -> list[str]:
    """The columns of a file; of JSONL, those of its first lines."""
    names = {"parquet": _parquet_names, "csv": _csv_names, "jsonl": _jsonl_names}
    try:
        return list(names[file.format](file))
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(file, error) from error


def check_columns(file: TableFile, columns: Sequence[str], there: Sequence[str]) -> None:
    """DataError when one of `columns` is missing from a file, or is in it twice."""
    for column in columns:
        count = list(there).count(column)
        if count != 1:
            state = "no column" if count == 0 else "two columns"
            raise DataError(f"{file.name}: {state} {column!r}; columns: {', '.join(there)}")


def _unreadable(file: TableFile, error: Exception) -> DataError:
    hint = "; each line is one JSON object" if file.format == "jsonl" else ""
    return DataError(f"{file.name}: cannot be read as {file.format}: {' '.join(str(error).split())}{hint}")


def _parquet_names(file: TableFile) -> list[str]:
    with file.filesystem.open_input_file(file.path) as source:
        return list(pq.read_schema(source).names)


def _read_parquet(file: TableFile, columns: list[str] | None, as_text: Sequence[str]) -> Any:
    with file.filesystem.open_input_file(file.path) as source:
        parquet = pq.ParquetFile(source)
        check_columns(file, columns or (), parquet.schema_arrow.names)
        return parquet.read(columns=columns)


def _csv_names(file: TableFile) -> list[str]:
    with _stream(file) as source:
        return list(pacsv.open_csv(source, parse_options=CSV).schema.names)


def _read_csv(file: TableFile, columns: list[str] | None, as_text: Sequence[str]) -> Any:
    check_columns(file, columns or (), _csv_names(file))
    convert = pacsv.ConvertOptions(
        column_types={name: pa.large_string() for name in as_text},
        include_columns=columns,
        strings_can_be_null=True,
        null_values=[""],
    )
    with _stream(file) as source:
        return pacsv.read_csv(source, parse_options=CSV, convert_options=convert)


def _jsonl_sample(file: TableFile) -> Any:
    with _stream(file) as source:
        sample = source.read(JSON_SAMPLE_BYTES)
    sample = sample[: sample.rfind(b"\n") + 1] or sample
    return pajson.read_json(io.BytesIO(sample), read_options=pajson.ReadOptions(block_size=JSON_SAMPLE_BYTES)).schema


def _jsonl_names(file: TableFile) -> list[str]:
    return list(_jsonl_sample(file).names)


def _read_jsonl(file: TableFile, columns: list[str] | None, as_text: Sequence[str]) -> Any:
    seen = _jsonl_sample(file)
    # Arrow would read text such as "2011-11-09" as a time.
    text = {n: pa.string() for n in as_text if n in seen.names and _is_text(seen.field(n).type)}
    if columns is not None and all(n in seen.names and not pa.types.is_null(seen.field(n).type) for n in columns):
        types = pa.schema([(n, text.get(n, seen.field(n).type)) for n in columns])
        try:
            return _parse_jsonl(file, types, "ignore")
        except pa.ArrowInvalid:
            pass  # A later line has another type than the first ones, such as 1.5 after 1: infer over the whole file.
    table = _parse_jsonl(file, pa.schema(list(text.items())), "infer")
    check_columns(file, columns or (), table.column_names)
    return table


def _parse_jsonl(file: TableFile, types: Any, others: Literal["ignore", "infer"]) -> Any:
    parse = pajson.ParseOptions(explicit_schema=types, unexpected_field_behavior=others)
    with _stream(file) as source:
        return pajson.read_json(source, read_options=pajson.ReadOptions(block_size=8 << 20), parse_options=parse)


def _is_text(kind: Any) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_temporal(kind))


def _stream(file: TableFile) -> Any:
    return file.filesystem.open_input_stream(file.path, compression="detect")
