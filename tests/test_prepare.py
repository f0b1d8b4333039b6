"""From files of every kind to a prepared store, and what wrong ones are answered."""

import gzip
import json
import os
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from seqray.config import Config
from seqray.errors import DataError
from seqray.sequences import SequenceStore
from train.prepare import ensure_store, main, prepare_store

LOG = pa.table(
    {
        "customer": ["b", "a", "a", "b", "a", "b", "a"],
        "sku": [10, 9, 10, 9, 11, 11, 9],
        "when": ["2024-01-02", "2024-01-01", "2024-01-03", "2024-01-04", "2024-01-02", "2024-01-05", "2024-01-04"],
        "unused": [[1], [], [], [2], [], [], []],
    }
)
COLUMNS = {"user_id": "customer", "item_id": "sku", "timestamp": "when"}
FORMATS = ["log.parquet", "log.csv", "log.csv.gz", "log.jsonl"]


def write(path: Path, table: pa.Table) -> Path:
    """Writes the table in the format of the file name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        flat = table.drop_columns([n for n in ("unused",) if n in table.column_names])
        pacsv.write_csv(flat, path.with_suffix("") if path.suffix == ".gz" else path)
        if path.suffix == ".gz":
            path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))
            path.with_suffix("").unlink()
    return path


def config(log: Path | str | list[str], **data: Any) -> Config:
    first = log[0] if isinstance(log, list) else str(log)
    store = str(Path(first).parent.parent / "store")
    path = log if isinstance(log, list) else str(log)
    return Config.parse({"name": "t", "data": {"path": path, "columns": COLUMNS, "store": store, **data}})


def prepare(settings: Config) -> SequenceStore:
    prepare_store(settings)
    return SequenceStore(settings.data.store)


def histories(store: SequenceStore) -> dict[Any, list[Any]]:
    users, ends = store.user_ids.to_pylist(), store.offsets
    return {
        user: [store.vocabulary.item_id(i) for i in store.items[begin:end]]
        for user, begin, end in zip(users, ends[:-1], ends[1:], strict=True)
    }


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_store(tmp_path: Path, name: str) -> None:
    store = prepare(config(write(tmp_path / "log" / name, LOG)))
    assert histories(store) == {"a": [9, 11, 10, 9], "b": [10, 9, 11]}
    assert store.user_ids.to_pylist() == ["a", "b"]
    assert store.items_table.to_pylist() == [
        {"item_id": 9, "train_events": 1},
        {"item_id": 10, "train_events": 1},
        {"item_id": 11, "train_events": 1},
    ]
    assert store.timestamps[0] == 1_704_067_200_000_000
    assert store.train_end.tolist() == [2, 1]
    assert [len(store.queries(split)) for split in ("val", "test")] == [2, 2]
    assert store.manifest["counts"] == {
        "rows_read": 7,
        "quarantined": {},
        "other_events": 0,
        "repeated_events": 0,
        "dropped_items": 0,
        "dropped_repeats": 0,
        "dropped_by_filter": 0,
        "users": 2,
        "items": 3,
        "events": 7,
        "train_events": 3,
        "val_users": 2,
        "test_users": 2,
    }
    assert store.manifest["time_range"] == ["2024-01-01T00:00:00Z", "2024-01-05T00:00:00Z"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "store"]
    assert sorted(path.name for path in store.folder.iterdir()) == ["items.parquet", "manifest.json", "sequences.arrow"]


def test_a_folder_and_several_paths_are_read_by_name(tmp_path: Path) -> None:
    table = LOG.set_column(2, "when", pa.array([0] * 7))
    write(tmp_path / "log" / "2" / "b.parquet", table.slice(3))
    write(tmp_path / "log" / "1.parquet", table.slice(0, 3))
    write(tmp_path / "log" / "_SUCCESS.parquet", table)
    folder = prepare(config(tmp_path / "log"))
    assert histories(folder) == {"a": [9, 10, 11, 9], "b": [10, 9, 11]}
    files = [str(tmp_path / "log" / "2" / "b.parquet"), str(tmp_path / "log" / "1.parquet")]
    assert histories(prepare(config(files))) == {"a": [11, 9, 9, 10], "b": [9, 11, 10]}


def test_order_without_timestamps_is_file_order(tmp_path: Path) -> None:
    log = write(tmp_path / "log" / "log.csv", LOG)
    store = prepare(config(log, columns={**COLUMNS, "timestamp": None}))
    assert histories(store) == {"a": [9, 10, 11, 9], "b": [10, 9, 11]}
    assert not store.has_timestamps
    assert store.timestamps.tolist() == [1, 2, 4, 6, 0, 3, 5]
    assert store.manifest["time_range"] is None


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_ties_by_column_are_numbers_where_they_are(tmp_path: Path, name: str) -> None:
    table = pa.table({"customer": [1] * 4, "sku": [1, 2, 3, 4], "when": [0] * 4, "line": [10, 9, None, 2]})
    log = write(tmp_path / "log" / name, table)
    assert histories(prepare(config(log, tie_order="column", tie_column="line"))) == {1: [4, 2, 1, 3]}


def test_repeats_are_dropped_before_the_minimums_count(tmp_path: Path) -> None:
    log = write(tmp_path / "log" / "log.parquet", LOG)
    store = prepare(config(log, repeats="drop", min_user_events=3))
    assert histories(store) == {"a": [9, 11, 10], "b": [10, 9, 11]}
    assert store.manifest["counts"]["dropped_repeats"] == 1
    with pytest.raises(DataError, match="no events are left"):
        prepare(config(log, repeats="drop", min_user_events=4))
    assert histories(SequenceStore(store.folder)) == histories(store)


def test_dropped_items_and_one_event_a_basket(tmp_path: Path) -> None:
    table = pa.table(
        {"customer": [1] * 6, "sku": [7, 9, 7, 8, 7, 7], "when": [1, 1, 2, 3, 5, 5], "order": list("xxxyyy")}
    )
    log = write(tmp_path / "log" / "log.parquet", table)
    columns = {**COLUMNS, "basket": "order"}
    store = prepare(config(log, columns=columns, repeats="once_per_basket", drop_items=["9", "unknown"]))
    assert histories(store) == {1: [7, 8, 7]}
    assert (store.manifest["counts"]["dropped_items"], store.manifest["counts"]["dropped_repeats"]) == (1, 2)
    by_time = prepare(config(log, repeats="once_per_basket"))
    assert histories(by_time) == {1: [7, 9, 7, 8, 7]}


@pytest.mark.parametrize("name", ["items.parquet", "items.csv", "items.jsonl"])
def test_the_item_table_is_matched_by_text_and_its_last_row_counts(tmp_path: Path, name: str) -> None:
    log = write(tmp_path / "log" / "log.parquet", LOG)
    table = pa.table(
        {"id": ["9", "10", "77", "9"], "name": ["old", "1999-01-01", "other", "new"], "price": [1.0, None, 3.0, 4.0]}
    )
    items = write(tmp_path / "items" / name, table)
    store = prepare(config(log, items={"path": str(items), "item_id": "id", "title": "name"}))
    assert store.items_table.to_pylist() == [
        {"item_id": 9, "train_events": 1, "title": "new", "price": 4.0},
        {"item_id": 10, "train_events": 1, "title": "1999-01-01", "price": None},
        {"item_id": 11, "train_events": 1, "title": None, "price": None},
    ]
    bare = prepare(config(log, items={"path": str(items), "item_id": "id", "keep": ["price"]}))
    assert bare.items_table.column_names == ["item_id", "train_events", "price"]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"id": [9], "train_events": [1]}, {"item_id": "id"}, "'train_events' has a name of ours"),
        ({"id": [9], "name": ["x"], "title": ["y"]}, {"item_id": "id", "title": "name"}, "'title' has a name of ours"),
        ({"id": [9]}, {}, "no column 'item_id'; columns: id"),
        ({"id": [9]}, {"item_id": "id", "keep": ["price"]}, "no column 'price'"),
        ({"id": [9], "title": [[1]]}, {"item_id": "id"}, "a title is text"),
    ],
)
def test_an_item_table_that_does_not_fit(
    tmp_path: Path, table: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    log = write(tmp_path / "log" / "log.parquet", LOG)
    items = write(tmp_path / "items" / "items.parquet", pa.table(table))
    with pytest.raises(DataError, match=message) as caught:
        prepare(config(log, items={"path": str(items), **options}))
    assert str(items) in str(caught.value)


BAD = pa.table(
    {
        "customer": ["a", None, "a", "a", "a", "b"],
        "sku": ["1", "2", "", "4", "5", None],
        "when": ["2024-01-01", "2024-01-01", "2024-01-01", None, "yesterday", "2024-01-01"],
    }
)


@pytest.mark.parametrize("name", FORMATS)
def test_an_event_that_was_sent_twice_counts_once_and_others_not_at_all(tmp_path: Path, name: str) -> None:
    kinds = ["view", "view", "buy", "impression", "view", "buy", None]
    numbers = ["e1", "e2", "e3", "e3", "e1", "e5", "e7"]
    log = LOG.append_column("what", pa.array(kinds)).append_column("number", pa.array(numbers))
    write(tmp_path / "log" / f"1{name[3:]}", log)
    write(tmp_path / "log" / f"2{name[3:]}", log.slice(2, 4))
    columns = {**COLUMNS, "event": "what", "event_id": "number"}
    once = prepare(config(tmp_path / "log", columns=columns, keep_events=["view", "buy", "impression"]))
    assert histories(once) == {"a": [9, 10], "b": [10, 11]}
    counts = once.manifest["counts"]
    assert (counts["rows_read"], counts["other_events"], counts["repeated_events"]) == (11, 1, 6)
    bought = prepare(config(tmp_path / "log", columns=columns, keep_events=["buy"], event_types=["buy"]))
    assert histories(bought) == {"a": [10], "b": [11]}
    assert bought.event_types.tolist() == [1, 1]


def test_a_row_that_is_left_out_is_not_bad_and_one_without_an_event_id_is_no_repeat(tmp_path: Path) -> None:
    what = pa.array(["view"] * 7 + [None, "view", "view", "view", "impression", "impression"])
    both = pa.concat_tables([LOG.drop_columns("unused").cast(BAD.schema), BAD])
    both = both.append_column("what", what).append_column("number", pa.nulls(13, pa.string()))
    columns = {**COLUMNS, "event": "what", "event_id": "number"}
    log = write(tmp_path / "log" / "log.parquet", both)
    counts = prepare(config(log, columns=columns, keep_events=["view"], max_bad_share=0.5)).manifest["counts"]
    assert counts["quarantined"] == {"null_user_id": 1, "null_item_id": 1, "null_timestamp": 1}
    assert (counts["events"], counts["other_events"], counts["repeated_events"]) == (7, 3, 0)


@pytest.mark.parametrize("name", FORMATS)
def test_bad_rows_go_to_quarantine(tmp_path: Path, name: str) -> None:
    log = write(tmp_path / "log" / name, pa.concat_tables([LOG.drop_columns("unused").cast(BAD.schema), BAD]))
    store = prepare(config(log, max_bad_share=0.5))
    reasons = {"null_user_id": 1, "null_item_id": 2, "null_timestamp": 1, "bad_timestamp": 1}
    assert store.manifest["counts"]["quarantined"] == reasons
    assert (store.manifest["counts"]["rows_read"], store.manifest["counts"]["events"]) == (13, 8)
    rows = pq.read_table(store.folder / "quarantine" / "bad_rows.parquet").to_pylist()
    assert [row["row"] for row in rows] == [9, 10, 11, 12, 13]
    assert rows[3] == {
        "file": str(log),
        "row": 12,
        "reason": "bad_timestamp",
        "user_id": "a",
        "item_id": "5",
        "timestamp": "yesterday",
    }


def test_too_many_bad_rows_stop_and_are_kept(tmp_path: Path) -> None:
    log = write(tmp_path / "log" / "log.parquet", BAD)
    for _ in range(2):
        with pytest.raises(DataError, match=r"5 of 6 rows are bad \(83\.33%; null_user_id 1, .*1\.00%") as caught:
            prepare(config(log))
    rejected = tmp_path / "store.rejected" / "quarantine" / "bad_rows.parquet"
    assert str(rejected) in str(caught.value)
    assert pq.read_table(rejected).num_rows == 5
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.csv", b"customer,sku\na,1\n", "no column 'when'; columns: customer, sku"),
        ("log.jsonl", b'{"customer": "a", "sku": 1}\n', "no column 'when'; columns: customer, sku"),
        ("log.csv", b"", "cannot be read as csv"),
        ("log.csv", b"customer,sku,when\n", "no rows"),
        ("log.csv", b"customer,sku,when\na,1\n", "cannot be read as csv"),
        ("log.csv", b"customer,sku,when\n\xff,1,1\n", "cannot be read as csv"),
        ("log.jsonl", b'[{"customer": "a"}]', "each line is one JSON object"),
        ("log.jsonl", b"", "cannot be read as jsonl"),
        ("log.jsonl", b'{"customer": true, "sku": 1, "when": 1}', "column 'customer'.*this column is bool"),
        ("log.jsonl", b'{"customer": 1, "sku": 1, "when": true}', "column 'when'.*this column is bool"),
        ("log.jsonl", b'{"customer": 1, "sku": [1], "when": 1}', "column 'sku'.*this column is list"),
        ("log.parquet", b"PAR1 or not", "cannot be read as parquet"),
        ("log.xlsx", b"", "unknown kind of file; choices: .parquet"),
    ],
)
def test_a_log_that_does_not_fit_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    log = tmp_path / "log" / name
    log.parent.mkdir()
    log.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        prepare(config(log))
    assert str(log) in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_mixed_formats_missing_and_empty_folders_are_named(tmp_path: Path) -> None:
    write(tmp_path / "log" / "a.parquet", LOG)
    write(tmp_path / "log" / "b.csv", LOG)
    with pytest.raises(DataError, match=r"b\.csv: is csv but .*a\.parquet is parquet"):
        prepare(config(tmp_path / "log"))
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        prepare(config(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty: no files"):
        prepare(config(tmp_path / "empty"))


def test_jsonl_whose_types_change_after_the_first_lines(tmp_path: Path) -> None:
    log = tmp_path / "log" / "log.jsonl"
    log.parent.mkdir()
    rows = [{"customer": i % 9, "sku": i % 7, "when": i, "padding": "x" * 500} for i in range(3000)]
    log.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[-1], "when": 4000.5, "customer": 3.0}]))
    store = prepare(config(log))
    assert store.user_ids.to_pylist() == list(range(9))
    assert store.timestamps.max() == 4_000_500_000


def test_ensure_store_prepares_only_what_changed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log" / "log.parquet", LOG)
    settings = config(log)
    ensure_store(settings)
    assert "no prepared store there" in capsys.readouterr().out
    before = (tmp_path / "store" / "manifest.json").read_bytes()
    assert histories(ensure_store(settings.override({"seed": 1, "train.epochs": 3})))["b"] == [10, 9, 11]
    assert capsys.readouterr().out == ""
    assert (tmp_path / "store" / "manifest.json").read_bytes() == before

    assert len(ensure_store(settings.override({"data.min_user_events": 4})).user_ids) == 1
    assert "changed since: data.min_user_events" in capsys.readouterr().out
    ensure_store(settings)
    os.utime(log, ns=(1, 1))
    capsys.readouterr()
    ensure_store(settings)
    assert "changed since: the log" in capsys.readouterr().out


def test_seed_counts_only_where_ties_are_shuffled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = config(write(tmp_path / "log" / "log.parquet", LOG), tie_order="shuffle")
    ensure_store(settings)
    capsys.readouterr()
    ensure_store(settings.override({"seed": 1}))
    assert "preparing" in capsys.readouterr().out


def test_a_remote_log_and_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = f"fsspec+memory://{uuid.uuid4().hex}"
    filesystem, path = pafs.FileSystem.from_uri(f"{root}/log")
    filesystem.create_dir(path)
    pq.write_table(LOG, f"{path}/part.parquet", filesystem=filesystem)
    settings = config(f"{root}/log", store=f"{root}/store").override({"cluster.cache_folder": str(tmp_path / "cache")})
    for _ in range(2):
        store = ensure_store(settings)
        assert histories(store) == {"a": [9, 11, 10, 9], "b": [10, 9, 11]}
    assert capsys.readouterr().out.count("preparing") == 1
    assert store.folder.parent == tmp_path / "cache"


def test_the_command_prints_counts_and_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log" / "log.csv", LOG)
    yaml = tmp_path / "c.yaml"
    yaml.write_text(config(log).yaml())
    assert main([str(yaml), "data.min_user_events=4"]) == 0
    out = capsys.readouterr().out
    assert f"store: {tmp_path / 'store'}" in out
    assert f"python -m train {yaml} data.min_user_events=4" in out
    assert main([str(yaml), "data.path=nowhere.csv"]) == 2
    assert "nowhere.csv: no such file" in capsys.readouterr().err
