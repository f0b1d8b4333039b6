"""What a model may read beside the items: event types from the log to the store, columns of the item table."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch

from seqray.catalogue import Catalogue
from seqray.config import Config
from seqray.errors import ConfigError, DataError
from seqray.model_sections import ItemColumn, SASRecConfig
from seqray.models.items import EventEmbedding, ItemEmbedding, NamedTable, gap_bucket, gap_row
from seqray.sequences import UNKNOWN_TIME, Batch, SequenceStore
from train.prepare import ensure_store, prepare_store

LOG = pa.table(
    {
        "user_id": [1, 0, 0, 0, 1, 0, None],
        "item_id": [9, 8, 9, 8, 8, 7, 7],
        "timestamp": [5, 3, 1, 2, 4, 4, 9],
        "what": ["buy", "view", "cart", "buy", None, "", "buy"],
    }
)


def settings(folder: Path, table: pa.Table = LOG, name: str = "log.parquet", **data: Any) -> Config:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    elif path.suffix == ".csv":
        pacsv.write_csv(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    columns = {"event": "what"}
    data = {"path": str(path), "columns": columns, "event_types": ["view", "buy"], "max_bad_share": 0.5, **data}
    return Config.parse({"name": "features", "output": str(folder / "out"), "data": data})


def typed(store: SequenceStore) -> list[list[tuple[int, int]]]:
    """(item id, event type) of each user's events."""
    assert store.event_types is not None
    pairs = list(zip(store.items.tolist(), store.event_types.tolist(), strict=True))
    named = [(store.vocabulary.item_id(item), kind) for item, kind in pairs]
    return [named[begin:end] for begin, end in zip(store.offsets[:-1], store.offsets[1:], strict=True)]


@pytest.mark.parametrize("name", ["log.parquet", "log.csv", "log.jsonl"])
def test_event_types_are_in_the_store_beside_their_events(tmp_path: Path, name: str) -> None:
    store = ensure_store(settings(tmp_path, name=name))
    assert typed(store) == [[(9, 0), (8, 2), (8, 1), (7, 0)], [(8, 0), (9, 2)]]
    assert store.event_types is not None
    assert store.event_types.dtype == np.int8
    assert store.catalogue.event_types == ("view", "buy")
    batch = store.queries("test").history(8)
    assert batch.events_T is not None
    assert batch.events_T.tolist() == [0, 2, 1]


def test_event_types_stay_with_their_events_through_all_that_is_left_out(tmp_path: Path) -> None:
    config = settings(tmp_path, repeats="drop", drop_items=["7"], min_user_events=2)
    assert typed(ensure_store(config)) == [[(9, 0), (8, 2)], [(8, 0), (9, 2)]]


def test_several_files_and_numbers_as_types(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    kinds = pa.array([2, 1, 3, 2, None, 7, 2], pa.int16())
    for number, part in enumerate((LOG.slice(0, 3), LOG.slice(3))):
        values = kinds.slice(0, 3) if number == 0 else kinds.slice(3).dictionary_encode()
        pq.write_table(part.set_column(3, "what", values), tmp_path / "log" / f"{number}.parquet")
    config = settings(tmp_path).override({"data.path": str(tmp_path / "log"), "data.event_types": ["1", "2"]})
    assert typed(ensure_store(config)) == [[(9, 0), (8, 2), (8, 1), (7, 0)], [(8, 0), (9, 2)]]


def test_a_log_without_any_of_the_types_is_refused(tmp_path: Path) -> None:
    config = settings(tmp_path, event_types=["View", "Buy"])
    with pytest.raises(
        DataError, match=r"'what' holds none of data.event_types View, Buy; it holds , buy, cart, view$"
    ):
        prepare_store(config)
    many = LOG.slice(0, 6).set_column(3, "what", pa.array([f"e{n}" for n in range(6)]))
    many = pa.concat_tables([many, many.set_column(3, "what", pa.array([f"f{n}" for n in range(6)]))])
    with pytest.raises(DataError, match=r"e0, .*f3, \.\.\.$"):
        prepare_store(settings(tmp_path, many))
    with pytest.raises(DataError, match="it holds nulls"):
        prepare_store(settings(tmp_path, LOG.set_column(3, "what", pa.nulls(7, pa.string()))))
    with pytest.raises(DataError, match="no column 'kind'"):
        prepare_store(settings(tmp_path, columns={"event": "kind"}))


def test_other_types_make_another_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    ensure_store(config)
    store = ensure_store(config.override({"data.event_types": ["cart"]}))
    assert "changed since: data.event_types" in capsys.readouterr().out
    assert typed(store)[0][0] == (9, 1)
    plain = ensure_store(config.override({"data.event_types": [], "data.columns.event": None}))
    assert plain.event_types is None
    assert plain.queries("test").history(8).events_T is None


@pytest.mark.parametrize(
    ("types", "message"),
    [([], "go with columns.event"), (["a", "a"], "twice"), ([f"t{n}" for n in range(128)], "127")],
)
def test_event_types_that_cannot_be(tmp_path: Path, types: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, event_types=types)


def codes(values: pa.Array, buckets: int | None = None) -> tuple[list[list[int]], tuple[str, ...]]:
    """(codes of each item without the zeros that fill up, names) of a column."""
    catalogue = Catalogue(len(values), pa.table({"item_id": range(len(values)), "it": values}))
    found = catalogue.codes(ItemColumn(column="it", buckets=buckets))
    rows = found.lists_KC[found.list_V].tolist()
    assert not any(rows[0])
    return [[code for code in row if code] for row in rows[1:]], found.names


def test_categories_are_in_order_of_text_and_no_value_is_none() -> None:
    assert codes(pa.array(["b", None, "a", "", "b"])) == ([[2], [], [1], [], [2]], ("a", "b"))
    assert codes(pa.array(["b", None, "a"]).dictionary_encode()) == ([[2], [], [1]], ("a", "b"))
    assert codes(pa.array([1.5, math.nan, None, 0.5])) == ([[2], [], [], [1]], ("0.5", "1.5"))
    assert codes(pa.array([True, False, None])) == ([[2], [1], []], ("false", "true"))
    assert codes(pa.nulls(2)) == ([[], []], ())


def test_a_list_is_several_categories() -> None:
    genres = pa.array([["Drama", "War", "Drama"], [], None, [None, "War"], ["Action"]])
    assert codes(genres) == ([[2, 3], [], [], [3], [1]], ("Action", "Drama", "War"))
    paths = pa.array([[["Beauty", "Nails"], ["Beauty", "Hair"]], [["Hair"]], [], [None]])
    assert codes(paths) == ([[1, 3, 2], [2], [], []], ("Beauty", "Hair", "Nails"))
    long = pa.array([[f"{n:02d}" for n in range(20)], ["00"]])
    assert codes(long)[0] == [list(range(1, 17)), [1]]


def test_buckets_hold_equal_shares() -> None:
    values = pa.array([5.0, None, 1, 2, 3, 4, 6, math.nan, math.inf])
    assert codes(values, 3) == ([[3], [], [1], [1], [2], [2], [3], [], []], ("1 of 3", "2 of 3", "3 of 3"))
    assert codes(pa.array([1, 1, 1, 1, 9]), 4)[0] == [[2], [2], [2], [2], [4]]
    assert codes(pa.array([1, 9, 9, 9, 9]), 4)[0] == [[1], [3], [3], [3], [3]]
    assert codes(pa.array([None, math.nan]), 2) == ([[], []], ("1 of 2", "2 of 2"))
    assert codes(pa.array([[1, 9], [2]]), 2)[0] == [[1, 2], [2]]


@pytest.mark.parametrize(
    ("values", "buckets", "message"),
    [
        (pa.array(["cheap", "dear"]), 2, "is large_string and cannot be read as numbers"),
        (pa.array([{"a": 1}, {"a": 2}]), None, "is struct.* and cannot be read as text"),
        (pa.array([f"Title {n}" for n in range(1001)]), None, r"1,001 values for 1,001 items"),
    ],
)
def test_a_column_that_does_not_fit(values: pa.Array, buckets: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=f"model.item_columns: 'it' .*{message}"):
        codes(values, buckets)


@pytest.mark.parametrize("items", [None, pa.table({"item_id": [1], "price": [1.0]})])
def test_a_column_that_is_not_there_names_the_choices(items: pa.Table | None) -> None:
    with pytest.raises(ConfigError, match=r"no column 'prize' in the item table .*choices: (price|none)$"):
        Catalogue(1, items).codes(ItemColumn(column="prize"))


ITEMS = pa.table({"item_id": range(4), "genres": [["a", "b"], ["b"], None, ["c"]], "price": [1.0, 2.0, 3.0, None]})
COLUMNS = (ItemColumn(column="genres"), ItemColumn(column="price", buckets=2))


@pytest.mark.parametrize("options", [{}, {"separate_output": True}, {"normalize": True}])
def test_an_item_is_its_own_vector_and_the_mean_of_its_categories(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    items = ItemEmbedding(SASRecConfig(hidden_dim=8, item_columns=COLUMNS, **options), Catalogue(4, ITEMS))
    genres, price = (table.weight for table in items.columns)
    own = items.embedding.weight
    added = torch.stack([(genres[1] + genres[2]) / 2 + price[1], genres[2] + price[2], price[2], genres[3]])
    read = own[1:] + added
    torch.testing.assert_close(items(torch.tensor([1, 2, 3, 4, 0, 1])), torch.cat([read, own[:1], read[:1]]))
    scored = (own if items.output is None else items.output.weight)[1:] + added
    expected = torch.nn.functional.normalize(scored, dim=1) if options.get("normalize") else scored
    torch.testing.assert_close(items.weights()[1:], expected)
    assert not items.weights()[0].any()
    items.weights().sum().backward()
    for table in items.columns:
        assert table.weight.grad is not None
        assert not table.weight.grad[0].any()
    assert sorted(items.state_dict())[:3] == ["columns.0.weight", "columns.1.weight", "embedding.weight"]


def test_unknown_times_and_types_add_nothing() -> None:
    torch.manual_seed(0)
    events = EventEmbedding(
        SASRecConfig(hidden_dim=8, event_type=True, time_gap=True, season=True), Catalogue(4, None, ("view",))
    )
    assert isinstance(events.event, NamedTable)
    day = 86_400_000_000
    times = torch.tensor([day, 2 * day, UNKNOWN_TIME, UNKNOWN_TIME])
    following = torch.tensor([2 * day, 3 * day, UNKNOWN_TIME, UNKNOWN_TIME])
    items, lengths = torch.tensor([1, 2, 3, 4]), torch.tensor([2, 2])
    zeros = torch.zeros(4, 8)
    batch = Batch(items, lengths, None, times, following, torch.tensor([1, 0, 0, 1]))
    added = events(zeros, batch)
    assert not added[2].any()
    torch.testing.assert_close(added[3], events.event.weight[1])
    alone = events(zeros[:2], Batch(items[:2], lengths[:1], None, times[:2], following[:2], torch.tensor([1, 0])))
    torch.testing.assert_close(added[:2], alone)
    assert not events(zeros, Batch(items, lengths)).any()


def test_gaps_fall_into_two_buckets_for_each_doubling() -> None:
    seconds = torch.tensor([-5.0, 0, 1.4, 1.5, 2, 3, 4, 2**40])
    assert gap_bucket((seconds * 1e6).long()).tolist() == [0, 0, 0, 1, 2, 3, 4, 51]
    known, unknown = torch.tensor([7_000_000]), torch.tensor([UNKNOWN_TIME])
    assert [int(gap_row(*pair)) for pair in ((known, known), (known, unknown), (unknown, known))] == [1, 0, 0]
    assert int(gap_row(unknown, unknown)) == 0
