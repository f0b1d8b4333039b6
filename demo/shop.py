"""A made-up shop: a seeded log of events and its item table, with the structure that real logs have.

Customers have favourite categories, a price level and a brand; they work through projects (camera, lens, tripod ...)
over several sessions, keep to brand and colour, look at popular and new things in between, and buy coffee beans and
dog food again and again. What comes next in a project depends on the last two things, not on the last one alone.
"""

import math
import os
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

# category -> its lines: title, price, and how many days a pack lasts (0: nothing that is used up)
CATEGORIES: dict[str, tuple[tuple[str, float, int], ...]] = {
    "Photography": (("mirrorless camera", 900, 0), ("camera lens", 450, 0), ("travel tripod", 120, 0),
                    ("camera bag", 80, 0), ("memory card", 35, 0)),
    "Running": (("trail running shoes", 130, 0), ("running socks", 15, 0), ("running jacket", 90, 0),
                ("sports watch", 250, 0), ("energy gels", 20, 14)),
    "Coffee": (("espresso machine", 400, 0), ("coffee grinder", 150, 0), ("milk jug", 25, 0),
               ("coffee beans", 16, 21), ("coffee filters", 6, 30)),
    "Dogs": (("dog bed", 70, 0), ("dog lead", 25, 0), ("chew toy", 12, 0), ("dog food", 45, 28), ("dog treats", 8, 14)),
    "Cycling": (("gravel bike", 1500, 0), ("bike helmet", 90, 0), ("bike lights", 45, 0), ("cycling gloves", 30, 0),
                ("chain oil", 11, 45)),
    "Baking": (("stand mixer", 350, 0), ("baking tin", 22, 0), ("cooling rack", 18, 0), ("piping bags", 9, 30),
               ("bread flour", 5, 14)),
    "Camping": (("two-person tent", 220, 0), ("sleeping bag", 120, 0), ("camping stove", 60, 0),
                ("head torch", 40, 0), ("gas canister", 8, 35)),
    "Home office": (("standing desk", 450, 0), ("office chair", 300, 0), ("desk lamp", 60, 0),
                    ("laptop stand", 45, 0), ("cable tray", 20, 0)),
    "Garden": (("raised bed", 90, 0), ("watering can", 25, 0), ("pruning shears", 30, 0), ("tomato seeds", 4, 0),
               ("potting soil", 14, 40)),
    "Music": (("electric guitar", 500, 0), ("guitar amplifier", 250, 0), ("effects pedal", 110, 0),
              ("guitar strap", 25, 0), ("guitar strings", 12, 30)),
    "Baby": (("baby carrier", 110, 0), ("baby bottles", 20, 0), ("muslin cloths", 18, 0), ("nappies", 30, 14),
             ("wet wipes", 10, 14)),
    "Decorating": (("wall paint", 40, 0), ("paint roller", 12, 0), ("brush set", 18, 0), ("drop cloth", 9, 0),
                   ("masking tape", 6, 30)),
}  # fmt: skip
BRANDS = ("Alder", "Birch", "Cedar", "Dune", "Ember")
COLOURS = ("black", "blue", "green", "grey", "red", "sand", "white", "yellow")
# Orders in which a category's lines are worked through: every pair of neighbours stands in one of them only.
PROJECTS = ((0, 1, 2, 3, 4), (3, 1, 4, 0, 2), (2, 1, 0, 4, 3))
HOURS = tuple(accumulate((1, 1, 1, 1, 1, 1, 2, 4, 6, 7, 7, 7, 8, 7, 6, 6, 7, 9, 11, 13, 14, 11, 6, 3)))
START = datetime(2026, 1, 1, tzinfo=UTC)
DAYS = 180

FOLLOW = 0.8  # share of contacts that go on with the project; the others are curiosity
SAME_BRAND = 0.9
SAME_COLOUR = 0.85
NEW_ARRIVALS = 0.08


@dataclass(frozen=True)
class Item:
    """One article of the shop; `launched` counts days from START and is negative for what was always there."""

    item_id: str
    title: str
    category: str
    price: float
    period: int
    launched: int
    place: tuple[int, int, int, int]  # category, line, brand, colour


@dataclass
class Catalogue:
    """All items, found by their place; `popular` holds the running sums of Zipf weights, in the order of `items`."""

    items: list[Item]
    at: dict[tuple[int, int, int, int], int] = field(default_factory=dict)
    popular: list[float] = field(default_factory=list)

    def pick(self, place: tuple[int, int, int, int], day: float, rng: random.Random) -> int | None:
        """The item at `place`, or one of another colour or brand when it is not made or not on sale yet."""
        category, line, brand, colour = place
        for _ in range(6):
            found = self.at.get((category, line, brand, colour))
            if found is not None and self.items[found].launched <= day:
                return found
            colour = _zipf(len(COLOURS), rng)
            brand = brand if rng.random() < 0.7 else rng.randrange(len(BRANDS))
        return None

    def curiosity(self, day: float, rng: random.Random) -> int:
        """Something popular, a little more often something new."""
        while True:
            found = bisect_right(self.popular, rng.random() * self.popular[-1])
            age = day - self.items[found].launched
            if age >= 0 and (age < 30 or rng.random() < 0.5):
                return found


@dataclass(frozen=True)
class Event:
    """One contact of a customer with an item; `kind` is how far it went: view, cart or purchase."""

    user: int
    item: int
    time: datetime
    kind: str
    session: int


def write_shop(folder: Path, seed: int, num_users: int = 3000, num_items: int = 1200) -> None:
    """Writes `events.parquet` and `items.parquet`; the same seed gives the same tables.

    Events: user_id, item_id, timestamp, event (how far the contact went), basket (of purchases), price; by time.
    Items: item_id, title, category, price, launched.
    """
    rng = random.Random(seed)
    catalogue = _catalogue(num_items, rng)
    events = [event for user in range(num_users) for event in _customer(user, catalogue, rng)]
    events.sort(key=lambda event: event.time)
    folder.mkdir(parents=True, exist_ok=True)
    _write(_items_table(catalogue), folder / "items.parquet")
    _write(_events_table(events, catalogue), folder / "events.parquet")


def _catalogue(num_items: int, rng: random.Random) -> Catalogue:
    names = list(CATEGORIES)
    numbers = rng.sample(range(1, num_items + 1), num_items)  # a SKU says nothing about its item
    catalogue = Catalogue([])
    weight = 0.0
    for index, number in enumerate(numbers):
        rest, category = divmod(index, len(names))
        rest, line = divmod(rest, len(PROJECTS[0]))
        colour, brand = divmod(rest, len(BRANDS))
        edition, colour = divmod(colour, len(COLOURS))
        title, price, period = CATEGORIES[names[category]][line]
        shown = f"{BRANDS[brand]} {title}, {COLOURS[colour]}" + (f", edition {edition + 1}" if edition else "")
        price *= 0.6 * 1.3**brand * rng.uniform(0.95, 1.05)
        launched = rng.randrange(10, DAYS - 10) if rng.random() < NEW_ARRIVALS else -rng.randrange(1, 900)
        place = (category, line, brand, colour)
        catalogue.items.append(
            Item(f"SKU-{number:04d}", shown, names[category], round(price, 2), period, launched, place)
        )
        catalogue.at.setdefault(place, index)
        weight += 1 / ((1 + category) ** 0.5 * (1 + line) ** 0.5 * (1 + brand) ** 0.5 * (1 + colour + edition))
        catalogue.popular.append(weight)
    return catalogue


def _customer(user: int, catalogue: Catalogue, rng: random.Random) -> Iterator[Event]:
    """All events of one customer."""
    favourites = [_zipf(len(CATEGORIES), rng) for _ in range(3)]
    brand = min(int(rng.betavariate(2, 2.5) * len(BRANDS)), len(BRANDS) - 1)
    joined = rng.uniform(0, DAYS * 0.6) if rng.random() < 0.4 else 0.0
    project = _projects(favourites, brand, rng)
    visits = sorted(
        _moment(rng.uniform(joined, DAYS), rng) for _ in range(1 + min(int(rng.lognormvariate(1.75, 0.7)), 40))
    )
    for number, visit in enumerate(visits):
        time = visit
        for item, curious in _session(project, catalogue, (visit - START) / timedelta(days=1), rng):
            chance = rng.random() * (2.5 if curious else 1.0)
            kind = "purchase" if chance < 0.3 else "cart" if chance < 0.42 else "view"
            yield Event(user, item, time, kind, number)
            time += timedelta(seconds=rng.randrange(15, 240))
    yield from _subscriptions(user, favourites, brand, joined, catalogue, rng)


def _projects(favourites: Sequence[int], brand: int, rng: random.Random) -> Iterator[tuple[int, int, int, int]]:
    """The places a customer's projects lead to, one after the other, for ever."""
    while True:
        category = rng.choice(favourites) if rng.random() < 0.85 else _zipf(len(CATEGORIES), rng)
        colour = _zipf(len(COLOURS), rng)
        for line in rng.choice(PROJECTS)[rng.randrange(2) :]:
            own = brand if rng.random() < SAME_BRAND else rng.randrange(len(BRANDS))
            yield category, line, own, colour if rng.random() < SAME_COLOUR else _zipf(len(COLOURS), rng)


def _session(
    project: Iterator[tuple[int, int, int, int]], catalogue: Catalogue, day: float, rng: random.Random
) -> Iterator[tuple[int, bool]]:
    """Items of one visit, and whether each was curiosity."""
    while True:
        item = catalogue.pick(next(project), day, rng) if rng.random() < FOLLOW else None
        yield (catalogue.curiosity(day, rng), True) if item is None else (item, False)
        if rng.random() < 0.27:
            return


def _subscriptions(
    user: int, favourites: Sequence[int], brand: int, joined: float, catalogue: Catalogue, rng: random.Random
) -> Iterator[Event]:
    """Things used up and bought again, each customer at their own pace."""
    for number, category in enumerate(sorted(set(favourites)), start=1000):
        line = rng.randrange(3, 5)
        item = catalogue.pick((category, line, brand, _zipf(len(COLOURS), rng)), joined, rng)
        if item is None or not catalogue.items[item].period or rng.random() < 0.7:
            continue
        period = catalogue.items[item].period * rng.uniform(1.2, 2.4)
        day = joined + rng.uniform(0, period)
        count = 0
        while day < DAYS:
            yield Event(user, item, _moment(day, rng), "purchase", 1000 * number + count)
            day += period + rng.gauss(0, 1.5)
            count += 1


def _zipf(size: int, rng: random.Random) -> int:
    """A number below `size`; the number n comes with a weight near 1 / (n + 1)."""
    return min(int(math.exp(rng.random() * math.log(size + 1))), size) - 1


def _moment(day: float, rng: random.Random) -> datetime:
    """A time on `day`, most often in the evening."""
    hour = bisect_right(HOURS, rng.random() * HOURS[-1])
    return START + timedelta(days=int(day), hours=hour, seconds=rng.randrange(3600))


def _items_table(catalogue: Catalogue) -> pa.Table:
    items = sorted(catalogue.items, key=lambda item: item.item_id)
    launched: list[date] = [(START + timedelta(days=item.launched)).date() for item in items]
    return pa.table(
        {
            "item_id": [item.item_id for item in items],
            "title": [item.title for item in items],
            "category": [item.category for item in items],
            "price": [item.price for item in items],
            "launched": pa.array(launched, pa.date32()),
        }
    )


def _events_table(events: Sequence[Event], catalogue: Catalogue) -> pa.Table:
    baskets: dict[tuple[int, int], str] = {}
    for event in events:
        if event.kind == "purchase":
            baskets.setdefault((event.user, event.session), f"B{len(baskets) + 1:06d}")
    items = catalogue.items
    return pa.table(
        {
            "user_id": [f"u{event.user:05d}" for event in events],
            "item_id": [items[event.item].item_id for event in events],
            "timestamp": pa.array([event.time for event in events], pa.timestamp("ms", tz="UTC")),
            "event": [event.kind for event in events],
            "basket": pa.array(
                [baskets[event.user, event.session] if event.kind == "purchase" else None for event in events],
                pa.string(),
            ),
            "price": [items[event.item].price for event in events],
        }
    )


def _write(table: pa.Table, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    pq.write_table(table, temporary)
    os.replace(temporary, path)
