"""Canary and shadow on two real replicas: who gets which version, whose answers they are, and what is compared."""

import http.client
import json
import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.promote_under_load import Expected, Server, answers_of, is_as, requests_of
from benchmarks.serve_targets import make_bundle

USERS, TIMES, SHARE = 200, 4, 0.3
REPLICA = re.compile(r'replica="(?P<replica>\w+)"')
COMPARED = re.compile(r'seqray_shadow_comparisons\{outcome="(\w+)",[^}]*\} (\S+)')
ANSWERED = re.compile(r'seqray_requests_total\{endpoint="recommend",[^}]*status="200"\} (?P<count>\S+)')

Told = tuple[str, str]
"""Version and variant of an answer."""


@pytest.mark.slow
def test_users_keep_their_version_on_any_replica_until_the_challenger_is_promoted(free_port: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: Ray's sockets are below it
    try:
        bundles = {str(number): make_bundle(folder / f"bundle-{number}", 100, number) for number in (1, 2)}
        asked = [{**one, "user_id": f"u{n}"} for n, one in enumerate(requests_of(bundles["1"], USERS, 5, 10))]
        settings = ("serve.min_replicas=2", "serve.max_replicas=2", f"serve.canary_share={SHARE}", "serve.shadow=true")
        server = Server(folder, free_port, f"serve.bundle={bundles['1'].folder}", *settings)
        try:
            assert len(server.replicas()) == 2
            canary_then_promote(server, free_port, str(bundles["2"].folder), asked, answers_of(bundles, asked))
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def canary_then_promote(server: Server, port: int, challenger: str, asked: list[dict], expected: Expected) -> None:
    pages(port)  # HAProxy hears of the second replica up to a second after the first
    assert set(versions(port, asked, expected)) == {("1", "champion")}
    server.command("promote", challenger, "--challenger")
    before = measured(port)

    told = [versions(port, asked, expected) for _ in range(TIMES)]
    assert all(one == told[0] for one in told)
    assert set(told[0]) == {("1", "champion"), ("2", "challenger")}
    assert told[0].count(("2", "challenger")) / USERS == pytest.approx(SHARE, abs=0.1)

    by_champion = TIMES * told[0].count(("1", "champion"))
    after = settled(port, before["compared"] + by_champion)
    assert after["compared"] + after["dropped"] - before["compared"] - before["dropped"] == by_champion
    assert after["compared"] - before["compared"] > 0.9 * by_champion
    assert after["failed"] == 0

    server.command("promote", "--version", "2")
    for _ in range(TIMES):
        assert set(versions(port, asked, expected)) == {("2", "champion")}


def versions(port: int, asked: Sequence[dict], expected: Expected) -> list[Told]:
    """What answered each request, each on a connection of its own; the items have to be those of that version."""

    def ask(place: int) -> Told:
        answer = json.loads(got(port, "POST", "/v1/recommend", json.dumps(asked[place])))
        model = answer["model"]
        items = [(item["item_id"], item["score"]) for item in answer["items"]]
        assert is_as(items, expected[model["version"], place])
        return model["version"], model["variant"]

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(ask, range(len(asked))))


def measured(port: int) -> Counter[str]:
    """Comparisons by outcome, over both replicas, each of which has answered its share of the requests."""
    counts: Counter[str] = Counter()
    for page in pages(port):
        assert float(ANSWERED.search(page)["count"]) > USERS / 4
        counts.update({outcome: int(float(count)) for outcome, count in COMPARED.findall(page)})
    return counts


def pages(port: int) -> list[str]:
    """The metrics of both replicas, waiting for the second one."""
    found: dict[str, str] = {}
    deadline = time.monotonic() + 20
    while len(found) < 2:
        assert time.monotonic() < deadline
        page = got(port, "GET", "/metrics")
        found[REPLICA.search(page)["replica"]] = page
    return list(found.values())


def settled(port: int, compared: int) -> Counter[str]:
    """The same after the last comparison: they come after the answers."""
    deadline = time.monotonic() + 20
    while (counts := measured(port))["compared"] + counts["dropped"] < compared and time.monotonic() < deadline:
        time.sleep(0.2)
    return counts


def got(port: int, method: str, path: str, body: str | None = None) -> str:
    """The body of an answer that has to be 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers: dict[str, Any] = {"Content-Type": "application/json", "Connection": "close"}
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    text = response.read().decode()
    connection.close()
    assert response.status == 200, text
    return text
