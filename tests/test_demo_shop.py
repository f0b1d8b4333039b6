from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from demo.shop import write_shop


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> tuple[pa.Table, pa.Table]:
    folder = tmp_path_factory.mktemp("shop")
    write_shop(folder, seed=1)
    return pq.read_table(folder / "events.parquet"), pq.read_table(folder / "items.parquet")


@pytest.fixture(scope="module")
def histories(shop: tuple[pa.Table, pa.Table]) -> list[list[str]]:
    found = defaultdict(list)
    for user, item in zip(shop[0]["user_id"].to_pylist(), shop[0]["item_id"].to_pylist(), strict=True):
        found[user].append(item)
    return [history for history in found.values() if len(history) >= 4]


def hit_rate(histories: list[list[str]], order: int, k: int = 10) -> float:
    """Hit rate at k of the last item, predicted from the `order` items before it, falling back to fewer of them."""
    counts: list[defaultdict[tuple[str, ...], Counter[str]]] = [defaultdict(Counter) for _ in range(order + 1)]
    for history in histories:
        for at in range(len(history) - 1):
            for length in range(min(order, at) + 1):
                counts[length][tuple(history[at - length : at])][history[at]] += 1
    hits = 0
    for history in histories:
        best: list[str] = []
        for length in range(order, -1, -1):
            known = counts[length][tuple(history[-1 - length : -1])]
            best += [item for item, _ in known.most_common(k) if item not in best]
        hits += history[-1] in best[:k]
    return hits / len(histories)


def test_the_same_seed_gives_the_same_tables(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        write_shop(tmp_path / name, seed, num_users=40, num_items=300)
    for file in ("events.parquet", "items.parquet"):
        first, again, other = (pq.read_table(tmp_path / name / file) for name in "abc")
        assert first.equals(again)
        assert not first.equals(other)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["events.parquet", "items.parquet"]


def test_the_tables_fit_together(shop: tuple[pa.Table, pa.Table]) -> None:
    events, items = shop
    assert events.column_names == ["user_id", "item_id", "timestamp", "event", "basket", "price"]
    assert items.column_names == ["item_id", "title", "category", "price", "launched"]
    assert 60_000 < events.num_rows < 110_000
    assert items.num_rows == 1200
    assert len(set(items["title"].to_pylist())) == 1200
    assert len(set(items["category"].to_pylist())) == 12
    assert len(set(events["user_id"].to_pylist())) == 3000
    assert set(events["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())
    assert set(events["event"].to_pylist()) == {"view", "cart", "purchase"}
    assert pc.all(pc.equal(pc.is_valid(events["basket"]), pc.equal(events["event"], "purchase"))).as_py()
    times = events["timestamp"].to_pylist()
    assert times == sorted(times)
    assert 170 < (times[-1] - times[0]).days < 182


def test_nothing_is_seen_before_its_launch(shop: tuple[pa.Table, pa.Table]) -> None:
    events, items = shop
    launched = dict(zip(items["item_id"].to_pylist(), items["launched"].to_pylist(), strict=True))
    pairs = zip(events["item_id"].to_pylist(), events["timestamp"].to_pylist(), strict=True)
    assert all(time.date() >= launched[item] for item, time in pairs)
    start = events["timestamp"][0].as_py().date()
    assert 50 < sum(day > start for day in launched.values()) < 200


def test_some_things_are_bought_again_and_again(shop: tuple[pa.Table, pa.Table]) -> None:
    bought = shop[0].filter(pc.equal(shop[0]["event"], "purchase"))
    times = Counter(zip(bought["user_id"].to_pylist(), bought["item_id"].to_pylist(), strict=True))
    assert sum(count >= 4 for count in times.values()) > 300


def test_popularity_falls_off_but_not_to_nothing(shop: tuple[pa.Table, pa.Table]) -> None:
    counts = sorted(Counter(shop[0]["item_id"].to_pylist()).values(), reverse=True)
    assert sum(counts[:120]) > 0.25 * sum(counts)
    assert len(counts) > 1100


def test_the_last_item_tells_much_and_the_one_before_it_more(histories: list[list[str]]) -> None:
    popularity, markov_1, markov_2 = (hit_rate(histories, order, k) for order, k in ((0, 10), (1, 10), (2, 10)))
    assert markov_1 > 4 * popularity
    assert markov_1 > 0.25
    assert hit_rate(histories, 2, k=1) > 1.2 * hit_rate(histories, 1, k=1)
    assert markov_2 > markov_1 - 0.01
