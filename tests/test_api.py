"""The endpoints beside recommend: batch, similar-items, rank, explain; filters and deadlines over HTTP."""

import threading
from collections.abc import Iterator, Sequence

import pytest
from starlette.testclient import TestClient

from seqray.bundle import Bundle
from seqray.recommender import Query, Recommender, SimilarQuery
from serve.application import build_application
from serve.served_model import ServedModel
from serve.service import Service

CHEAP = {"field": "price", "lt": 20}


class GatedRecommender(Recommender):
    """Answers when the gate is open, and remembers what it was asked."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle)
        self.gate = threading.Event()
        self.gate.set()
        self.asked: list[int] = []

    def recommend(self, queries: Sequence[Query | SimilarQuery]):
        """See Recommender."""
        assert self.gate.wait(30)
        self.asked += [query.k for query in queries]
        return super().recommend(queries)


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Bundle) -> GatedRecommender:
    return GatedRecommender(tiny_bundle)


@pytest.fixture(scope="module")
def client(recommender: GatedRecommender) -> Iterator[TestClient]:
    service = Service("tiny", ServedModel(recommender, "tiny", "champion", 8), deadline_ms=500)
    service.warm_up()
    with TestClient(build_application(service)) as client:
        yield client


def ids(body: dict) -> list:
    assert [item["rank"] for item in body["items"]] == list(range(1, len(body["items"]) + 1))
    return [item["item_id"] for item in body["items"]]


def pointers(response) -> list[str]:
    assert response.status_code == 400, response.text
    return [error["pointer"] for error in response.json()["errors"]]


def test_a_filter_over_http_gives_what_it_gives_offline(client: TestClient, recommender: Recommender) -> None:
    body = client.post("/v1/recommend", json={"history": ["i1"], "k": 30, "filter": CHEAP}).json()
    [expected] = recommender.recommend([Query(("i1",), 30, filter=recommender.read_filter(CHEAP))])
    assert ids(body) == [item.item_id for item in expected.items]
    assert len(body["items"]) == 9
    assert body["warnings"] == []


def test_a_filter_that_no_item_meets_is_an_empty_answer_with_a_warning(client: TestClient) -> None:
    response = client.post("/v1/recommend", json={"history": ["i1"], "filter": {"field": "price", "lt": -1}})
    assert response.status_code == 200
    assert response.json()["items"] == []
    assert response.json()["warnings"] == ["filter: no item that may be returned meets it"]


@pytest.mark.parametrize(
    ("chosen", "pointer"),
    [
        ({"field": "colour", "eq": 1}, "/filter/field"),
        ({"all": [CHEAP, {"field": "price", "eq": "x"}]}, "/filter/all/1/eq"),
        ([], "/filter"),
        ("price < 3", "/filter"),
    ],
)
def test_a_mistake_in_a_filter_has_its_pointer(client: TestClient, chosen: object, pointer: str) -> None:
    assert pointers(client.post("/v1/recommend", json={"filter": chosen})) == [pointer]
    assert pointers(client.post("/v1/similar-items", json={"item_id": "i1", "filter": chosen})) == [pointer]
    body = client.post("/v1/recommend:batch", json={"requests": [{}, {"filter": chosen}]}).json()
    assert body["results"][1]["problem"]["errors"][0]["pointer"] == f"/requests/1{pointer}"


def test_a_batch_answers_each_request_by_itself(client: TestClient) -> None:
    requests = [{"history": ["i1"], "k": 3}, {"k": 0}, {"history": ["nope"], "k": 2}, 7]
    body = client.post("/v1/recommend:batch", json={"requests": requests}).json()
    first, second, third, fourth = body["results"]
    assert ids(first["result"]) == ids(client.post("/v1/recommend", json=requests[0]).json())
    assert second["problem"]["errors"] == [
        {"pointer": "/requests/1/k", "detail": "Input should be greater than or equal to 1"}
    ]
    assert (second["problem"]["status"], second["problem"]["code"]) == (400, "INVALID_ARGUMENT")
    assert third["result"]["fallback_used"]
    assert fourth["problem"]["errors"][0]["pointer"] == "/requests/3"
    assert all(len(one) == 1 for one in body["results"])


@pytest.mark.parametrize("requests", [None, [], [{}] * 65, {"history": []}])
def test_a_batch_has_1_to_64_requests(client: TestClient, requests: object) -> None:
    assert pointers(client.post("/v1/recommend:batch", json={"requests": requests})) == ["/requests"]


def test_similar_items(client: TestClient, recommender: Recommender) -> None:
    asked = {"item_id": "i3", "k": 5, "exclude_items": ["i5"], "filter": CHEAP, "include": ["score", "metadata"]}
    body = client.post("/v1/similar-items", json=asked).json()
    query = SimilarQuery("i3", 5, ("i5",), filter=recommender.read_filter(CHEAP))
    [expected] = recommender.recommend([query])
    assert ids(body) == [item.item_id for item in expected.items]
    assert [item["score"] for item in body["items"]] == pytest.approx([item.score for item in expected.items])
    assert body["items"][0]["metadata"]["price"] < 20
    unknown = client.post("/v1/similar-items", json={"item_id": "nope", "k": 2}).json()
    assert (ids(unknown), unknown["fallback_used"], unknown["unknown_items"]) == (["i2", "i1"], True, ["nope"])
    assert pointers(client.post("/v1/similar-items", json={"k": 3})) == ["/item_id"]


def test_rank_orders_the_candidates(client: TestClient, recommender: Recommender) -> None:
    candidates = ["i9", "i1", "i4", "nope"]
    body = client.post("/v1/rank", json={"history": ["i1", "i2"], "candidates": candidates}).json()
    [whole] = recommender.recommend([Query(("i1", "i2"), 30, exclude_seen=False)])
    assert ids(body) == [item.item_id for item in whole.items if item.item_id in candidates]
    assert body["unknown_items"] == ["nope"]
    assert pointers(client.post("/v1/rank", json={"history": ["i1"]})) == ["/candidates"]
    assert pointers(client.post("/v1/rank", json={"candidates": ["i1"] * 1001})) == ["/candidates"]


def test_explanations_name_events_of_the_request(client: TestClient) -> None:
    history = [f"i{n}" for n in (5, 9, 11, 3)]
    asked = {"history": history, "k": 3, "explain": True}
    body = client.post("/v1/recommend", json=asked).json()
    assert all(set(item) == {"item_id", "rank", "score", "source", "explanation"} for item in body["items"])
    reasons = [reason for item in body["items"] for reason in item["explanation"]]
    assert reasons
    for reason in reasons:
        assert history[reason["position"]] == reason["item_id"]
        assert reason["effect"] > 0
    assert client.post("/v1/explain", json={"history": history, "k": 3}).json()["items"] == body["items"]
    long = client.post("/v1/recommend", json={**asked, "history": ["i1"] * 1000 + history}).json()
    assert [r["position"] - 1000 for i in long["items"] for r in i["explanation"] if r["item_id"] != "i1"]
    for item in long["items"]:
        for reason in item["explanation"]:
            assert (["i1"] * 1000 + history)[reason["position"]] == reason["item_id"]


def test_explain_takes_items_of_the_history_too(client: TestClient) -> None:
    body = client.post("/v1/explain", json={"history": ["i1", "i2"], "items": ["i1", "i9", "nope"]}).json()
    assert sorted(ids(body)) == ["i1", "i9"]
    assert body["unknown_items"] == ["nope"]
    assert all("explanation" in item for item in body["items"])
    assert pointers(client.post("/v1/explain", json={"items": ["i1"], "k": 2})) == [""]


@pytest.mark.parametrize("deadline_ms", [50, None])
def test_a_deadline_is_a_504_and_its_work_is_dropped(
    client: TestClient, recommender: GatedRecommender, deadline_ms: int | None
) -> None:
    named = {} if deadline_ms is None else {"deadline_ms": deadline_ms}
    recommender.gate.clear()
    recommender.asked.clear()
    try:
        late = [client.post("/v1/recommend", json={"history": ["i1"], "k": k, **named}) for k in (1, 2, 3)]
        batch = client.post("/v1/recommend:batch", json={"requests": [{"k": 4, **named}]}).json()
    finally:
        recommender.gate.set()
    for response in late:
        assert response.status_code == 504
        assert response.json()["code"] == "DEADLINE_EXCEEDED"
    assert batch["results"][0]["problem"]["status"] == 504
    assert client.post("/v1/recommend", json={"history": ["i1"], "k": 5}).status_code == 200
    assert recommender.asked == [1, 5]  # the first was being answered, the others waited and were never ranked


@pytest.mark.parametrize("deadline_ms", [0, -1, 60_001, 1.5, "80"])
def test_a_deadline_has_its_limits(client: TestClient, deadline_ms: object) -> None:
    assert pointers(client.post("/v1/recommend", json={"deadline_ms": deadline_ms})) == ["/deadline_ms"]
