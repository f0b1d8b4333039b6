"""The item table of the store: our own columns, then what the user's table says about each item."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from seqray.data_config import ItemsConfig
from seqray.errors import DataError
from seqray.id_columns import id_column
from seqray.table_files import TableFile, check_columns, column_names, find_files, read_columns

IntArray = npt.NDArray[np.int64]

RESERVED = ("item_id", "train_events")
TITLE = "title"


def item_table(item_ids: Any, train_events: IntArray, config: ItemsConfig | None) -> Any:
    """Arrow table in index order: item_id, train_events, then title and the kept columns where there is a table.

    Items are found in the user's table by the text of their id, the last of several rows counts, and an item
    without a row has nulls. DataError names the file and column that do not fit.
    """
    table = pa.table({"item_id": item_ids, "train_events": pa.array(train_events, pa.int64())})
    if config is None:
        return table
    texts, rows = _read_table(config)
    row = _last_row(item_ids, texts)
    for name in rows.column_names:
        table = table.append_column(name, rows.column(name).take(row))
    return table


def _last_row(item_ids: Any, texts: Any) -> Any:
    # For each item the last row of the user's table with its id, null when there is none.
    position = pc.index_in(texts, value_set=item_ids.cast(texts.type))
    known = np.flatnonzero(position.is_valid().to_numpy(zero_copy_only=False))
    last = np.full(len(item_ids), -1, np.int64)
    np.maximum.at(last, position.take(known).to_numpy(), known)
    return pa.array(last, mask=last < 0)


def _read_table(config: ItemsConfig) -> tuple[Any, Any]:
    files = find_files(config.path)
    ids, tables = [], []
    for file in files:
        there = column_names(file)
        title = config.title or (TITLE if TITLE in there else None)
        text = [config.item_id, *([title] if title else [])]
        check_columns(file, text, there)
        table = read_columns(file, None if config.keep is None else [*text, *config.keep], as_text=text)
        where = f"{file.name}: column {config.item_id!r} (columns: {', '.join(there)})"
        ids.append(id_column(table.column(config.item_id), where).cast(pa.large_string()))
        tables.append(_kept(file, table, title, config))
    try:
        return pa.concat_arrays(ids), pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise DataError(f"{config.path}: the files' columns do not fit together: {error}") from error


def _kept(file: TableFile, table: Any, title: str | None, config: ItemsConfig) -> Any:
    columns = {}
    if title is not None:
        columns[TITLE] = _title(file, title, table.column(title))
    others = table.column_names if config.keep is None else config.keep
    for name in dict.fromkeys(others):
        if name in (title, config.item_id):
            continue
        if name in RESERVED or name in columns:
            raise DataError(
                f"{file.name}: column {name!r} has a name of ours ({', '.join((*RESERVED, TITLE))}); "
                "leave it out with data.items.keep, or rename it"
            )
        columns[name] = table.column(name)
    return pa.table(columns) if columns else table.select([])


def _title(file: TableFile, name: str, column: Any) -> Any:
    try:
        return column.cast(pa.large_string())
    except pa.ArrowException as error:
        raise DataError(f"{file.name}: column {name!r} is {column.type}, a title is text: {error}") from error
