"""Publishing and fetching folders, locally and behind a URI (an in-memory filesystem)."""

import uuid
from pathlib import Path

import pytest

from seqray.cache import Cache
from seqray.errors import DataError
from seqray.storage import open_filesystem, publish, temporary_folder


def write(target: str | Path, content: str) -> Path:
    folder = temporary_folder(target)
    (folder / "deep").mkdir()
    (folder / "deep" / "data.txt").write_text(content)
    (folder / "manifest.json").write_text(f'{{"content": "{content}"}}')
    return folder


@pytest.fixture
def uri() -> str:
    return f"fsspec+memory://bucket/{uuid.uuid4().hex}/store"


def test_publish_replaces_a_local_folder_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "new" / "store"
    for content in ("one", "two"):
        publish(write(target, content), target)
        assert (target / "deep" / "data.txt").read_text() == content
    assert [path.name for path in target.parent.iterdir()] == ["store"]
    assert Cache(tmp_path / "cache").fetch(target) == target
    assert Cache(tmp_path / "cache").fetch(f"file://{target}") == target


def test_publish_never_replaces_what_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_text("meow")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        with pytest.raises(DataError, match=name):
            publish(write(tmp_path / name, "x"), tmp_path / name)
    assert (tmp_path / "photos" / "cat.jpg").exists()


def test_publish_wants_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"manifest\.json"):
        publish(temporary_folder(tmp_path / "store"), tmp_path / "store")


def test_a_remote_folder_is_copied_once(tmp_path: Path, uri: str) -> None:
    publish(write(uri, "one"), uri)
    copy = Cache(tmp_path).fetch(uri)
    assert (copy / "deep" / "data.txt").read_text() == "one"
    (copy / "deep" / "data.txt").write_text("read from the cache")
    assert Cache(tmp_path).fetch(uri) == copy
    assert (copy / "deep" / "data.txt").read_text() == "read from the cache"

    publish(write(uri, "two"), uri)
    assert (Cache(tmp_path).fetch(uri) / "deep" / "data.txt").read_text() == "two"
    assert not [path for path in tmp_path.iterdir() if path.is_dir() and path.name.startswith(".")]


def test_a_remote_folder_without_manifest_does_not_count(tmp_path: Path, uri: str) -> None:
    publish(write(uri, "one"), uri)
    filesystem, path = open_filesystem(uri)
    filesystem.delete_file(f"{path}/manifest.json")
    with pytest.raises(DataError, match="nothing complete"):
        Cache(tmp_path).fetch(uri)
    with pytest.raises(DataError, match="not replaced"):
        publish(write(uri, "two"), uri)


@pytest.mark.parametrize("uri", ["nosuch://bucket/x", "fsspec+nosuch://x"])
def test_an_unknown_filesystem_is_named(uri: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nosuch"):
        Cache(tmp_path).fetch(uri)
