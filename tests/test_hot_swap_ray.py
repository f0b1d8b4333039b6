"""A promote and a rollback under a real `python -m serve` that is asked all the while."""

import http.client
import json
import shutil
import tempfile
from pathlib import Path

import pytest

from benchmarks.promote_under_load import Load, Server, answers_of, measure, requests_of
from benchmarks.serve_targets import make_bundle


def test_promote_and_rollback_under_load_lose_no_request_and_no_process(module_port: int) -> None:
    folder = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # short: Ray's sockets are below it
    try:
        bundles = {str(number): make_bundle(folder / f"bundle-{number}", 100, number) for number in (1, 2)}
        asked = requests_of(bundles["1"], 20, 5, 10)
        server = Server(folder, module_port, f"serve.bundle={bundles['1'].folder}", "serve.max_replicas=1")
        try:
            swapped_under_load(server, module_port, bundles, asked)
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    assert server.process.returncode == 0


def swapped_under_load(server: Server, port: int, bundles: dict, asked: list[dict]) -> None:
    replicas = server.replicas()
    assert len(replicas) == 1
    load = Load(port, 40, 4, asked, answers_of(bundles, asked))
    steps = [("promote", [str(bundles["2"].folder), "--why", "better"]), ("rollback", [])]
    rows = {row["phase"]: row for row in (phase.row() for phase in measure(server, load, steps, 1.0))}
    assert {name: (row["failed"], row["wrong"]) for name, row in rows.items()} == dict.fromkeys(rows, (0, 0))
    assert sum(row["sent"] for row in rows.values()) > 150
    versions = {name: row["versions"] for name, row in rows.items()}
    assert versions == {
        "before promote": "1",
        "promote": "1, 2",
        "before rollback": "2",
        "rollback": "1, 2",
        "after": "1",
    }
    assert server.replicas() == replicas
    damaged = bundles["2"].folder.with_name("damaged")
    shutil.copytree(bundles["2"].folder, damaged)
    (damaged / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(RuntimeError, match=r"promote ended with 2: .*model\.safetensors does not match"):
        server.command("promote", str(damaged))
    assert f"http://127.0.0.1:{port} serves version 2 as champion after" in server.command("promote", "--version", "2")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/v1/models")
    told = json.loads(connection.getresponse().read())
    connection.close()
    assert told["aliases"] == told["registry"]["aliases"] == {"champion": "2", "challenger": None}
