"""History in, top-k out."""

import time

import pytest
import torch
from conftest import NUM_ITEMS

from seqray import retrieval
from seqray.bundle import Bundle
from seqray.recommender import Query, Recommender, SimilarQuery
from seqray.sequences import Batch


@pytest.fixture(scope="module")
def recommender(tiny_bundle: Bundle) -> Recommender:
    return Recommender(tiny_bundle)


def ids(recommendation) -> list:
    return [item.item_id for item in recommendation.items]


def test_it_ranks_by_hidden_times_weights(recommender: Recommender, tiny_bundle: Bundle) -> None:
    model = tiny_bundle.model()
    with torch.no_grad():
        hidden = model.encode(Batch(torch.tensor([3, 5]), torch.tensor([2])))[-1]
        scores = (model.item_weights() @ hidden)[1:]
    [answer] = recommender.recommend([Query(("i3", "i5"), k=NUM_ITEMS, exclude_seen=False)])
    order = scores.argsort(descending=True)
    assert ids(answer) == [f"i{index + 1}" for index in order.tolist()]
    torch.testing.assert_close(torch.tensor([item.score for item in answer.items]), scores[order])
    assert {item.source for item in answer.items} == {"model"}


def test_only_the_newest_events_count_but_all_are_seen(recommender: Recommender) -> None:
    newest = tuple(f"i{index}" for index in range(10, 18))
    short, long = recommender.recommend(
        [Query(newest, k=5, exclude_seen=False), Query(("i1", "i2", *newest), k=5, exclude_seen=False)]
    )
    assert ids(short) == ids(long)
    [all_but_seen] = recommender.recommend([Query(("i1", "i2", *newest), k=NUM_ITEMS)])
    assert not {"i1", "i2", *newest} & set(ids(all_but_seen))
    assert len(all_but_seen.items) == NUM_ITEMS - 10


def test_exclude_seen_comes_from_the_bundle_unless_asked(recommender: Recommender) -> None:
    default, kept = recommender.recommend(
        [Query(("i1",), k=NUM_ITEMS), Query(("i1",), k=NUM_ITEMS, exclude_seen=False)]
    )
    assert "i1" not in ids(default)
    assert "i1" in ids(kept)


def test_excluded_items_are_left_out(recommender: Recommender) -> None:
    [before] = recommender.recommend([Query(("i1",), k=3)])
    [after] = recommender.recommend([Query(("i1",), k=3, exclude_items=(ids(before)[0], "never heard of"))])
    assert ids(after)[:2] == ids(before)[1:]


def test_unknown_items_are_dropped_and_listed_once(recommender: Recommender) -> None:
    plain, mixed = recommender.recommend([Query(("i1", "i2")), Query(("x", "i1", "y", "i2", "x"))])
    assert mixed.unknown_items == ("x", "y")
    assert ids(mixed) == ids(plain)
    assert not mixed.fallback_used


@pytest.mark.parametrize("history", [(), ("x",)])
def test_without_a_known_item_the_popular_ones_come(recommender: Recommender, history: tuple) -> None:
    [answer] = recommender.recommend([Query(history, k=4, exclude_items=("i1",))])
    assert ids(answer) == ["i2", "i3", "i4", "i5"]  # i3 and i4 have equal events: the lower index first
    assert [item.score for item in answer.items] == [1000.0, 97.0, 97.0, 96.0]
    assert {item.source for item in answer.items} == {"popular"}
    assert answer.fallback_used
    assert answer.unknown_items == history


def test_no_fallback_is_an_empty_answer(recommender: Recommender) -> None:
    [answer] = recommender.recommend([Query(("x",), fallback="none")])
    assert (answer.items, answer.fallback_used, answer.unknown_items) == ((), False, ("x",))


def test_fewer_items_than_k_are_left(recommender: Recommender) -> None:
    everything = tuple(f"i{index}" for index in range(1, NUM_ITEMS + 1))
    all_seen, all_excluded = recommender.recommend([Query(everything), Query((), exclude_items=everything)])
    assert (all_seen.items, all_seen.fallback_used) == ((), False)
    assert (all_excluded.items, all_excluded.fallback_used) == ((), True)


def test_an_answer_does_not_depend_on_its_batch(recommender: Recommender, monkeypatch) -> None:
    queries = [
        Query(("i1",), k=3),
        Query((), k=7),
        Query(tuple(f"i{index}" for index in range(1, 20)), k=NUM_ITEMS),
        Query(("i7", "x", "i7"), k=1, exclude_seen=False),
        Query(("i8", "i9"), k=500, exclude_items=("i10",)),
    ]
    alone = [recommender.recommend([query])[0] for query in queries]
    together = recommender.recommend(queries)
    monkeypatch.setattr(retrieval, "SCORES_AT_A_TIME", 2 * (NUM_ITEMS + 1))
    in_parts = recommender.recommend(queries)
    for one, other, part in zip(alone, together, in_parts, strict=True):
        assert ids(one) == ids(other) == ids(part)
        assert [item.score for item in one.items] == pytest.approx([item.score for item in other.items], abs=1e-5)
        assert (one.unknown_items, one.fallback_used) == (other.unknown_items, other.fallback_used)
    assert [len(one.items) for one in alone] == [3, 7, NUM_ITEMS - 19, 1, NUM_ITEMS - 3]


NOON = 1_750_000_000.0
DAY = 86_400.0


def scores(recommender: Recommender, *queries: Query) -> list[dict[str, float]]:
    """item_id -> score of the answer to each query."""
    return [{item.item_id: item.score for item in answer.items} for answer in recommender.recommend(queries)]


def told(*events: str | None, times: tuple[float | None, ...] = (), now: float | None = NOON + 9 * DAY) -> Query:
    return Query(("i1", "x", "i2", "i3"), NUM_ITEMS, (), False, events=events, timestamps=times, now=now)


def test_events_and_times_reach_the_model_in_line_with_the_known_items(featured_bundle: Bundle) -> None:
    times = tuple(NOON + day * DAY for day in (0, 1, 2, 5))
    microseconds = [round(1e6 * time) for time in (times[0], times[2], times[3], NOON + 9 * DAY)]
    batch = Batch(
        torch.tensor([1, 2, 3]), torch.tensor([3]), None,
        torch.tensor(microseconds[:-1]), torch.tensor(microseconds[1:]), torch.tensor([1, 0, 2]),
    )  # fmt: skip
    model = featured_bundle.model()
    with torch.no_grad():
        expected = (model.item_weights() @ model.encode(batch)[-1])[1:]
    query = told("view", "buy", "never heard of", "buy", times=times)
    [answer] = scores(Recommender(featured_bundle), query)
    assert [answer[f"i{index}"] for index in range(1, NUM_ITEMS + 1)] == pytest.approx(expected.tolist(), abs=1e-5)


def test_each_feature_moves_the_scores(featured_bundle: Bundle) -> None:
    times = (NOON, NOON, NOON + DAY, NOON + 2 * DAY)
    plain, typed, timed, later, half = scores(
        Recommender(featured_bundle),
        told(),
        told("view", "view", "view", "buy"),
        told(times=times),
        told(times=times, now=NOON + 100 * DAY),
        told(times=(*times[:-1], None)),
    )
    answers = [plain, typed, timed, later]
    assert all(one != pytest.approx(other, abs=1e-3) for i, one in enumerate(answers) for other in answers[:i])
    assert half == pytest.approx(plain, abs=1e-5)  # a time is missing, so none counts


def test_what_a_query_does_not_tell_adds_nothing_whatever_the_batch(featured_bundle: Bundle) -> None:
    recommender = Recommender(featured_bundle)
    full = told("view", None, "buy", "view", times=(NOON,) * 4)
    queries = [told(), full, told(times=(NOON,) * 4), told(None, None, None, "sell")]
    together = scores(recommender, *queries)
    for query, one in zip(queries, together, strict=True):
        assert one == pytest.approx(scores(recommender, query)[0], abs=1e-5)
    assert together[3] == pytest.approx(together[0], abs=1e-5)


def test_times_that_go_back_or_make_no_sense_are_no_failure(featured_bundle: Bundle) -> None:
    recommender = Recommender(featured_bundle)
    same, back = (told(times=times, now=NOON) for times in ((NOON,) * 4, (NOON + DAY, NOON, NOON, NOON)))
    assert scores(recommender, same)[0] == pytest.approx(scores(recommender, back)[0], abs=1e-5)
    for odd in (1e15, -1e15, float("nan"), float("inf")):
        [answer] = scores(recommender, told(times=(NOON, odd, -odd, odd)))
        assert len(answer) == NUM_ITEMS


def test_the_present_is_the_time_of_a_query_that_has_none(featured_bundle: Bundle) -> None:
    recommender, present = Recommender(featured_bundle), time.time()
    times = tuple(present - days * DAY for days in (9, 8, 7, 3))
    unsaid, said, earlier = scores(
        recommender, told(times=times, now=None), told(times=times, now=present), told(times=times, now=present - DAY)
    )
    assert unsaid == pytest.approx(said, abs=1e-5)
    assert unsaid != pytest.approx(earlier, abs=1e-3)


@pytest.mark.parametrize("values", [{"events": ("view",)}, {"timestamps": (1.0, 2.0, 3.0)}])
def test_events_and_timestamps_are_parallel_to_the_history(values: dict) -> None:
    with pytest.raises(ValueError, match="for 2 events"):
        Query(("i1", "i2"), **values)


def test_no_queries_no_answers(recommender: Recommender) -> None:
    assert recommender.recommend([]) == []


def test_metadata_are_the_columns_of_the_shop(recommender: Recommender) -> None:
    assert recommender.metadata(["i2", "i1"]) == [
        {"title": "Título 2", "price": None},
        {"title": "Título 1", "price": 1.0},
    ]


def test_a_filter_keeps_only_what_it_lets_through(recommender: Recommender) -> None:
    cheap = recommender.read_filter({"field": "price", "lt": 20})
    whole, filtered, popular = recommender.recommend(
        [Query(("i1", "i2"), NUM_ITEMS), Query(("i1", "i2"), NUM_ITEMS, filter=cheap), Query((), 3, filter=cheap)]
    )
    assert ids(filtered) == [item for item in ids(whole) if int(item[1:]) < 20 and int(item[1:]) % 2]
    assert ids(popular) == ["i1", "i3", "i5"]
    [nothing] = recommender.recommend([Query(("i1",), filter=recommender.read_filter({"field": "price", "lt": 0}))])
    assert nothing.items == ()
    assert not nothing.fallback_used


def test_candidates_are_ranked_as_the_catalogue_is(recommender: Recommender) -> None:
    candidates = ("i9", "i4", "nope", "i4", "i1", "i30")
    [whole, some, popular] = recommender.recommend(
        [
            Query(("i1", "i2"), NUM_ITEMS, exclude_seen=False),
            Query(("i1", "i2"), 10, candidates=candidates, exclude_seen=False),
            Query(("who",), 10, candidates=("i9", "i4", "i3", "i2")),
        ]
    )
    assert ids(some) == [item for item in ids(whole) if item in candidates]
    scores = {item.item_id: item.score for item in whole.items}
    assert [item.score for item in some.items] == pytest.approx([scores[item] for item in ids(some)])
    assert some.unknown_items == ("nope",)
    assert ids(popular) == ["i2", "i3", "i4", "i9"]
    assert popular.fallback_used


def test_candidates_may_all_be_excluded_or_unknown(recommender: Recommender) -> None:
    [excluded, unknown] = recommender.recommend(
        [Query(("i1",), candidates=("i1",), exclude_seen=True), Query(("i1",), candidates=("nope",))]
    )
    assert excluded.items == unknown.items == ()


def test_similar_items_have_the_largest_cosine(recommender: Recommender, tiny_bundle: Bundle) -> None:
    weights = torch.nn.functional.normalize(tiny_bundle.model().item_weights().detach(), dim=1)
    cosines = weights @ weights[3]
    order = [item for item in cosines.argsort(descending=True).tolist() if item not in (0, 3, 7)]
    [answer, unknown] = recommender.recommend(
        [SimilarQuery("i3", NUM_ITEMS, exclude_items=("i7",)), SimilarQuery("nope", 2, filter=None)]
    )
    assert ids(answer) == [f"i{item}" for item in order]
    assert [item.score for item in answer.items] == pytest.approx(cosines[order].tolist(), abs=1e-5)
    assert (ids(unknown), unknown.fallback_used, unknown.unknown_items) == (["i2", "i1"], True, ("nope",))


@pytest.mark.parametrize("name", ["tiny_bundle", "featured_bundle"])
def test_an_explanation_is_what_leaving_the_event_out_does(name: str, request: pytest.FixtureRequest) -> None:
    recommender = Recommender(request.getfixturevalue(name))
    history = ("i5", "nope", "i9", "i5", "i11")
    now = time.time()
    more = {"exclude_seen": False, "now": now, "events": ("view", None, "buy", "view", "buy")}
    more["timestamps"] = tuple(now - 86_400 * days for days in (9, 7, 4, 2, 1))
    [answer] = recommender.recommend([Query(history, 4, explain=True, **more)])
    assert len(answer.explanations) == 4
    for item, influences in zip(answer.items, answer.explanations, strict=True):
        effects = {}
        for place in (0, 2, 3, 4):
            rest = {key: tuple(v for n, v in enumerate(more[key]) if n != place) for key in ("events", "timestamps")}
            without = tuple(one for n, one in enumerate(history) if n != place)
            [other] = recommender.recommend([Query(without, NUM_ITEMS, **{**more, **rest})])
            effects[place] = item.score - {one.item_id: one.score for one in other.items}[item.item_id]
        expected = sorted((place for place in effects if effects[place] > 0), key=lambda place: -effects[place])
        assert [influence.place for influence in influences] == expected
        assert [influence.item_id for influence in influences] == [history[place] for place in expected]
        assert [influence.effect for influence in influences] == pytest.approx(
            [effects[place] for place in expected], abs=1e-4
        )


def test_the_only_event_explains_all(recommender: Recommender) -> None:
    [answer] = recommender.recommend([Query(("nope", "i5"), 2, explain=True)])
    assert answer.explanations == (((1, "i5", None),),) * 2
