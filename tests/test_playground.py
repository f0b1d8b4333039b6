"""The playground's search, and the page that is served; tests/test_playground_browser.py looks at it in a browser."""

import re
import time

import pyarrow as pa
import pytest
from conftest import NUM_ITEMS, save_tiny, tiny_config
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.recommender import Recommender
from serve.application import build_application
from serve.item_search import ItemSearch
from serve.page import FOLDER, MEDIA_TYPES
from serve.served_model import ServedModel
from serve.service import Service

TITLES = ["Crème brûlée", "red brulée set", "STRASSE map", None, "a\nred\tbike", "RED bike", "shred"]


def table(titles: list[str | None] = TITLES, **columns: object) -> pa.Table:
    """Items i0, i1, ... the later the more popular."""
    numbers = range(len(titles))
    ids = [f"i{number}" for number in numbers]
    return pa.table({"item_id": ids, "train_events": list(numbers), "title": titles, **columns})


@pytest.fixture(scope="module")
def client(tiny_bundle: Bundle) -> TestClient:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 4))
    service.warm_up()
    return TestClient(build_application(service, playground=True))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("creme", [0]),
        ("BRULEE", [1, 0]),
        ("brûlée crème", [0]),
        ("straße", [2]),
        ("red", [5, 4, 1, 6]),  # words that begin so, the more popular first, then the one that holds it
        ("ed bi", [5, 4]),
        ("i3", [3]),
        ("I3", [3]),
        ("nothing", []),
        ("red nothing", []),
        ("", [6, 5, 4, 3, 2, 1, 0]),
        (" \t", [6, 5, 4, 3, 2, 1, 0]),
    ],
)
def test_search_finds_words_whatever_case_and_accents(query: str, expected: list[int]) -> None:
    assert ItemSearch(table()).rows(query, 10) == (expected, len(expected))


def test_search_stops_at_the_limit_and_counts_all() -> None:
    assert ItemSearch(table()).rows("red", 2) == ([5, 4], 4)


def test_search_reads_every_text_column_and_no_other() -> None:
    kinds = pa.array(["Hat", None, "hat", "x", "x", "x", "x"]).dictionary_encode()
    items = table(kind=kinds, price=[77.0] * 7, tags=[["hat"]] * 7)
    assert ItemSearch(items).rows("hat", 10)[0] == [2, 0]
    assert ItemSearch(items).rows("77", 10)[0] == []


def test_the_whole_id_comes_first_and_ids_may_be_numbers() -> None:
    items = pa.table({"item_id": [1, 12, 123, 2], "train_events": [1, 5, 9, 7]})
    assert ItemSearch(items).rows("1", 10)[0] == [0, 2, 1]
    assert ItemSearch(items.slice(0, 0)).rows("1", 10) == ([], 0)


def test_100_000_items_are_searched_in_50_ms() -> None:
    titles = [f"Crème {number % 977} of word{number % 7919} and word{number % 6007}" for number in range(100_000)]
    search = ItemSearch(table(titles))
    search.rows("any", 1)
    took = []
    for query in ("creme", "word12", "o", "creme word77 of", "i99999"):
        start = time.perf_counter()
        rows, _ = search.rows(query, 20)
        took.append(time.perf_counter() - start)
        assert rows
    assert sorted(took)[2] < 0.05


def test_items_over_http(client: TestClient) -> None:
    body = client.get("/v1/items", params={"query": "titulo 1", "limit": 3}).json()
    assert [item["item_id"] for item in body["items"]] == ["i1", "i10", "i11"]
    assert body["items"][1]["metadata"] == {"title": "Título 10", "price": None}
    assert body["total"] == 12
    assert body["model"] == {"name": "tiny", "version": "tiny-1", "variant": "champion"}
    popular = client.get("/v1/items").json()
    assert [item["item_id"] for item in popular["items"][:3]] == ["i2", "i1", "i3"]
    assert (len(popular["items"]), popular["total"]) == (20, NUM_ITEMS)
    none = client.get("/v1/items", params={"query": "a\0\ufffd"}).json()
    assert (none["items"], none["total"]) == ([], 0)


@pytest.mark.parametrize(
    ("parameters", "pointer"),
    [("limit=0", "/limit"), ("limit=101", "/limit"), ("limit=x", "/limit"), ("limit=-1", "/limit"),
     ("limit=", "/limit"), ("limit=99999999999", "/limit"), ("limit=5&limit=6", "/limit"), ("q=x", "/q"),
     ("query=" + "x" * 257, "/query")],
)  # fmt: skip
def test_wrong_parameters_are_named(client: TestClient, parameters: str, pointer: str) -> None:
    response = client.get(f"/v1/items?{parameters}")
    assert response.status_code == 400
    assert [error["pointer"] for error in response.json()["errors"]] == [pointer]


@pytest.mark.parametrize("path", ["/", *(f"/playground/{name}" for name in MEDIA_TYPES)])
def test_the_page_is_guarded_by_its_headers(client: TestClient, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    assert response.headers["content-security-policy"].startswith("default-src 'self';")
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize("name", ["nothing.js", "..%2fpage.py", "%2e%2e/page.py", "/etc/passwd"])
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/playground/{name}").status_code == 404


def test_every_file_of_the_page_is_served_and_nothing_is_inline_or_from_elsewhere() -> None:
    assert {path.name for path in FOLDER.iterdir()} == set(MEDIA_TYPES)
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    for name in MEDIA_TYPES:
        text = (FOLDER / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text)


def test_without_the_playground_there_is_no_page(tiny_bundle: Bundle) -> None:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 4))
    client = TestClient(build_application(service))
    assert client.get("/").status_code == client.get("/playground/api.js").status_code == 404


@pytest.mark.parametrize(
    ("host", "playground", "shown"),
    [("127.0.0.1", "auto", True), ("::1", "auto", True), ("localhost", "auto", True), ("192.0.2.1", "auto", False),
     ("192.0.2.1", "on", True), ("127.0.0.1", "off", False)],
)  # fmt: skip
def test_the_page_shows_itself_on_loopback_alone_unless_told(host: str, playground: str, shown: bool) -> None:
    assert tiny_config(host=host, playground=playground).serve.shows_playground is shown


def test_titles_are_data(tmp_path) -> None:
    titles = ['<img src=x onerror="document.title=1">', *[f"Title {number}" for number in range(1, NUM_ITEMS)]]
    items = pa.table({"item_id": [f"i{number}" for number in range(1, NUM_ITEMS + 1)],
                      "train_events": list(range(NUM_ITEMS, 0, -1)), "title": titles})  # fmt: skip
    service = Service("odd", ServedModel(Recommender(save_tiny(tmp_path / "odd", items=items)), "odd", "champion", 4))
    service.warm_up()
    response = TestClient(build_application(service)).get("/v1/items", params={"query": "<img"})
    assert response.json()["items"][0]["metadata"]["title"] == titles[0]
    assert response.headers["content-type"] == "application/json"
