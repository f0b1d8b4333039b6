"""The registry: versions that stay what they are, aliases that one writer at a time changes, and the commands."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from registry_bundles import ADMISSION, registry_of, save_other
from s3_server import ENVIRONMENT, Bucket, s3_server
from safetensors.numpy import load_file, save_file

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.errors import BundleError, DataError
from seqray.folder import Folder
from seqray.manifest import write_manifest
from serve.admission import Admission
from serve.promote import promote, rollback, withdraw
from serve.registry import Conflict, Registry
from serve.registry_commands import COMMANDS


def rewrite_manifest(folder: Path) -> None:
    """A manifest that fits the changed files, as one would write who means harm."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = manifest.pop("files")
    manifest.pop("format_version")
    write_manifest(folder, manifest, files)


def spoil(folder: Path, how: str) -> Path:
    """A copy of the bundle in `folder` with something wrong."""
    broken = folder.with_name(f"{folder.name}-{how}")
    shutil.copytree(folder, broken)
    weights = broken / "model.safetensors"
    if how == "corrupt":
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "torn":
        weights.unlink()
    else:
        state = {name: tensor.copy() for name, tensor in load_file(weights).items()}
        name = next(name for name in state if name.startswith("items."))
        if how == "nan":
            state[name][1, 0] = np.nan
        elif how == "huge":
            state[name][:] = 3e38  # finite weights whose scores are not
        elif how == "mismatched":
            state[name] = state[name][:-1]
        save_file(state, weights)
        rewrite_manifest(broken)
    return broken


BROKEN = ["corrupt", "torn", "nan", "huge", "mismatched"]


def test_a_bundle_becomes_a_version_and_the_champion(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    [version] = registry.versions()
    assert (version.number, version.run_id, version.num_items) == (1, "run-1", 30)
    assert version.metrics == {"test/ndcg@10": 0.25}
    head = registry.head()
    assert (head.number, head.champion, head.challenger) == (1, 1, None)
    assert Bundle.load(registry.bundle(version)).version == "run-1"


def test_a_version_stays_what_it_was(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    [version] = registry.versions()
    shutil.rmtree(tmp_path / "bundle-1")
    copy = Path(registry.bundle(version))
    assert not any(file.stat().st_mode & 0o222 for file in copy.iterdir())
    assert ADMISSION.load(str(copy), version.manifest_sha256).version == "run-1"
    (copy / "metrics.json").unlink()
    (copy / "metrics.json").write_text('{"test/ndcg@10": 1.0}')
    (copy / "manifest.json").chmod(0o644)
    rewrite_manifest(copy)
    with pytest.raises(BundleError, match="not the one that was registered"):
        ADMISSION.load(str(copy), version.manifest_sha256)


def test_a_known_bundle_keeps_its_number(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2)
    version, change = promote(registry, ADMISSION, str(tmp_path / "bundle-1"), why="better after all")
    assert (version.number, change.old, change.new) == (1, 2, 1)
    assert len(registry.versions()) == 2
    with pytest.raises(DataError, match="version 1 is the champion already"):
        promote(registry, ADMISSION, str(tmp_path / "bundle-1"))
    shutil.rmtree(registry.bundle(registry.version(2)))
    assert promote(registry, ADMISSION, str(tmp_path / "bundle-2"))[0].number == 2
    assert ADMISSION.load(registry.bundle(registry.version(2))).version == "run-2"


def test_rollback_goes_back_step_by_step(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2, 3)
    assert [rollback(registry, ADMISSION).new for _ in range(2)] == [2, 1]
    with pytest.raises(DataError, match="no champion before 1"):
        rollback(registry, ADMISSION)
    promote(registry, ADMISSION, 3)
    assert registry.head().champions == (3, 1)


def test_each_change_says_who_when_why_and_from_what_to_what(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2)
    promote(registry, ADMISSION, 1, challenger=True, why="last year's")
    withdraw(registry)
    rollback(registry, ADMISSION, why="complaints")
    told = [(c.number, c.action, c.alias, c.old, c.new, c.why) for c in registry.changes()]
    assert told == [
        (1, "promote", "champion", None, 1, ""),
        (2, "promote", "champion", 1, 2, ""),
        (3, "challenge", "challenger", None, 1, "last year's"),
        (4, "withdraw", "challenger", 1, None, ""),
        (5, "rollback", "champion", 2, 1, "complaints"),
    ]
    for change in registry.changes():
        assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", change.when)
        assert re.fullmatch(r"\S+@\S+", change.who)


def test_the_promoted_challenger_challenges_no_more(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1)
    save_other(tmp_path / "bundle-2", 2)
    promote(registry, ADMISSION, str(tmp_path / "bundle-2"), challenger=True)
    head = registry.head()
    assert (head.champion, head.challenger) == (1, 2)
    for _ in range(2):
        with pytest.raises(DataError, match="already"):
            promote(registry, ADMISSION, 2, challenger=True)
    promote(registry, ADMISSION, 2)
    assert (registry.head().champion, registry.head().challenger) == (2, None)
    with pytest.raises(DataError, match="no challenger"):
        withdraw(registry)


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_bundle_changes_nothing(tmp_path: Path, how: str) -> None:
    registry = registry_of(tmp_path, 1)
    broken = spoil(save_other(tmp_path / "bundle-2", 2).folder, how)
    before = sorted(path for path in (tmp_path / "registry").rglob("*"))
    with pytest.raises(BundleError):
        promote(registry, ADMISSION, str(broken))
    assert sorted(path for path in (tmp_path / "registry").rglob("*")) == before


def test_a_bundle_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    bundle = save_other(tmp_path / "bundle-1", 1)
    (bundle.folder / "model.safetensors").write_bytes(b"not read")
    registry = Registry.at(tmp_path / "registry")
    with pytest.raises(BundleError, match=r"MB, more than serve\.max_bundle_mb 0\.001"):
        promote(registry, Admission(max_bundle_mb=0.001), str(bundle.folder))
    with pytest.raises(BundleError, match=r"30 items, more than serve\.max_items 29"):
        promote(registry, Admission(max_items=29), str(bundle.folder))
    assert registry.head().number == 0


def test_a_broken_version_is_no_way_back(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2)
    (Path(registry.bundle(registry.version(1))) / "items.parquet").unlink()
    with pytest.raises(BundleError, match=r"items\.parquet"):
        rollback(registry, ADMISSION)
    assert registry.head().champion == 2


def _race(folder: str, number: int, barrier: object, results: object) -> None:
    registry = Registry.at(folder)
    for round_ in range(1, 41):
        change = registry.head().challenged(number, f"round {round_}")
        barrier.wait()  # both have seen the same head
        try:
            registry.change(change)
            results.put((round_, number))
        except Conflict:
            pass
        barrier.wait()


def test_of_two_processes_exactly_one_changes_the_aliases(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_race, args=(str(tmp_path / "registry"), number, barrier, results)) for number in (1, 2)
    ]
    for process in processes:
        process.start()
    won = [results.get(timeout=60) for _ in range(40)]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert results.empty()
    assert sorted(round_ for round_, _ in won) == list(range(1, 41))
    changes = registry.changes()[2:]
    assert [(change.why, change.new) for change in changes] == [(f"round {r}", n) for r, n in sorted(won)]


def test_who_saw_an_older_change_is_told_who_was_faster(tmp_path: Path) -> None:
    registry = registry_of(tmp_path, 1, 2)
    seen = registry.head()
    rollback(registry, ADMISSION)
    with pytest.raises(Conflict, match=r"changed the champion from 2 to 1 meanwhile"):
        registry.change(seen.challenged(1, ""))
    assert registry.head().challenger is None


def test_a_file_is_created_once_and_whole(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "new")
    assert folder.create_text("a.json", "one")
    assert not folder.create_text("a.json", "two")
    assert folder.read_text("a.json") == "one"
    assert folder.names() == ["a.json"]


@pytest.mark.parametrize("text", ["", "{", '{"number": 1}', '{"number": 1, "bundle": "../../etc"}'])
def test_a_record_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    registry = registry_of(tmp_path, 1)
    path = tmp_path / "registry" / "versions" / "000001.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"versions/000001\.json: cannot be read"):
        registry.version(1)
    with pytest.raises(DataError, match="no version 7; versions: 1"):
        registry.version(7)


# On an object store


@pytest.fixture(scope="module")
def bucket(module_port: int) -> Iterator[Bucket]:
    with pytest.MonkeyPatch.context() as patch:
        for key, value in ENVIRONMENT.items():
            patch.setenv(key, value)
        with s3_server(module_port) as bucket:
            yield bucket


def test_a_registry_on_s3_is_one_too(bucket: Bucket, tmp_path: Path) -> None:
    registry = Registry.at(bucket.uri("shop/registry"))
    admission = Admission(cache=Cache(tmp_path / "cache"))
    for number in (1, 2):
        promote(registry, admission, str(save_other(tmp_path / f"bundle-{number}", number).folder))
    stale = registry.head()
    rollback(registry, admission)
    with pytest.raises(Conflict):
        registry.change(stale.challenged(1, ""))
    assert [(change.old, change.new) for change in registry.changes()] == [(None, 1), (1, 2), (2, 1)]
    assert registry.latest(registry.changes()[0]) == registry.head()
    version = registry.version(2)
    assert admission.load(registry.bundle(version), version.manifest_sha256).version == "run-2"
    weights = f"shop/registry/bundles/{version.bundle}/model.safetensors"
    bucket.write(weights, bucket.read(weights)[:-1] + b"\0")
    with pytest.raises(DataError, match=r"model\.safetensors does not match"):
        Admission(cache=Cache(tmp_path / "elsewhere")).load(registry.bundle(version), version.manifest_sha256)


def test_a_write_that_was_repeated_after_a_lost_answer_has_won(bucket: Bucket) -> None:
    folder = Folder.at(bucket.uri("lost"))
    assert folder.create_text("a.json", "mine")
    assert folder.create_text("a.json", "mine")
    assert not folder.create_text("a.json", "another's")


def test_other_stores_are_refused(tmp_path: Path) -> None:
    from seqray.exclusive import create_object

    with pytest.raises(DataError, match="not on gs://"):
        create_object("gs://bucket/registry/x", b"", None)


# The commands


def run(verb: str, *words: object) -> int:
    return COMMANDS[verb]([str(word) for word in words])


def test_the_commands_change_a_registry_without_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ("--registry", tmp_path / "registry")
    for number in (1, 2):
        bundle = save_other(tmp_path / f"bundle-{number}", number)
        assert run("promote", bundle.folder, *place, "--why", f"number {number}") == 0
    out = capsys.readouterr().out
    assert "version 2: run run-2, 30 items, test/ndcg@10 0.2500\nchampion: 1 -> 2" in out
    assert out.endswith(f"back:  python -m serve rollback --registry {tmp_path / 'registry'}\n")
    assert run("promote", "--version", 1, "--challenger", *place) == 0
    assert run("rollback", "--challenger", *place) == 0
    assert run("rollback", *place) == 0
    assert run("versions", *place) == 0
    out = capsys.readouterr().out
    assert "challenger: none -> 1" in out
    assert "challenger: 1 -> none" in out
    assert "champion: 2 -> 1" in out
    assert re.search(r"1\s+│ champion\s+│ run-1", out)
    assert "number 2" in out


def test_the_commands_take_the_registry_of_a_config(
    tmp_path: Path, free_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "shop.yaml"
    config.write_text(f"name: tiny\ndata: {{path: log.csv}}\nserve: {{registry: {tmp_path}/registry}}\n")
    bundle = save_other(tmp_path / "bundle", 1)
    port = f"serve.port={free_port}"
    assert run("promote", config, bundle.folder, port) == 0
    out = capsys.readouterr().out
    assert f"nothing answers at http://127.0.0.1:{free_port}; a replica takes version 1 when it starts" in out
    assert f"back:  python -m serve rollback {config} {port}" in out
    assert run("promote", save_other(tmp_path / "bundle-2", 2).folder, config, port, "serve.max_items=5") == 2
    assert "30 items, more than serve.max_items 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["promote", "bundle"], "name the registry: --registry FOLDER, or a CONFIG with serve.registry"),
        (["promote", "--registry", "r"], "name the BUNDLE"),
        (["promote", "--registry", "r", "bundle", "--version", "1"], "not both"),
        (["promote", "--registry", "r", "one", "two"], "2 are named: one, two"),
        (["promote", "--registry", "r", "one", "serve.port=1"], "no CONFIG (.yaml) is named"),
        (["promote", "--registry", "r", "nowhere"], "nowhere: no such folder"),
        (["promote", "--registry", "r", "x", "--wait", "localhost:8000"], "not an address such as"),
        (["rollback", "--registry", "r"], "nothing to go back to"),
        (["versions", "--registry", "r", "one"], "'one' is neither a CONFIG (.yaml) nor path=value"),
    ],
)
def test_a_wrong_command_line_is_told_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*words) == 2
    assert expected in capsys.readouterr().err


def test_the_command_line_knows_the_verbs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "serve", "versions", "--registry", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert "next:  python -m serve promote BUNDLE --registry" in done.stdout
