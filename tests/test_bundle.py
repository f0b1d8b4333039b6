"""A bundle is used whole and unchanged, or not at all."""

import json
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import NUM_ITEMS, save_tiny, tiny_config, tiny_items, tiny_state

from seqray.bundle import Bundle
from seqray.errors import BundleError
from seqray.manifest import verify_manifest, write_manifest


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return save_tiny(tmp_path / "bundle")


def relist(folder: Path) -> None:
    """Makes the manifest true again after a file was changed, as an attacker would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = [path.name for path in folder.iterdir() if path.name != "manifest.json"]
    write_manifest(folder, {key: manifest[key] for key in manifest if key != "files"}, files)


def test_what_was_saved_is_loaded(bundle: Bundle) -> None:
    loaded = Bundle.load(bundle.folder)
    assert loaded.config == tiny_config()
    assert loaded.items.equals(tiny_items())
    assert loaded.metrics["baselines"]["popularity"] == {"test/ndcg@10": 0.125}
    assert loaded.version == "tiny-1"
    assert loaded.vocabulary.index("i30") == NUM_ITEMS
    state = loaded.model().state_dict()
    assert not loaded.model().training
    assert all(torch.equal(state[name], tensor) for name, tensor in tiny_state(tiny_config()).items())
    assert sorted(path.name for path in bundle.folder.parent.iterdir()) == ["bundle"]


def test_the_manifest_says_where_it_comes_from(bundle: Bundle) -> None:
    manifest = json.loads((bundle.folder / "manifest.json").read_text())
    assert manifest["format_version"] == 1
    assert (manifest["run_id"], manifest["data_fingerprint"], manifest["parent"]) == ("tiny-1", "abc123", None)
    assert manifest["torch_version"] == torch.__version__
    assert sorted(manifest["files"]) == [
        "README.md", "config.yaml", "items.parquet", "metrics.json", "model.safetensors", "training.png",
    ]  # fmt: skip


def test_the_model_card_shows_the_model_beside_the_baselines(bundle: Bundle) -> None:
    card = (bundle.folder / "README.md").read_text()
    assert "| **model** | 0.2500 |" in card
    assert "| popularity | 0.1250 |" in card
    assert f"| Items | {NUM_ITEMS} |" in card


def test_the_curve_is_a_picture(bundle: Bundle) -> None:
    assert (bundle.folder / "training.png").read_bytes().startswith(b"\x89PNG")


def test_an_existing_folder_is_never_written_over(bundle: Bundle) -> None:
    before = (bundle.folder / "manifest.json").read_bytes()
    with pytest.raises(BundleError, match="already exists"):
        save_tiny(bundle.folder)
    assert (bundle.folder / "manifest.json").read_bytes() == before


def test_weights_that_cannot_be_served_leave_nothing_behind(tmp_path: Path) -> None:
    state = tiny_state(tiny_config())
    state["norm.bias"][0] = float("nan")
    with pytest.raises(BundleError, match=r"norm\.bias holds values that are not finite"):
        save_tiny(tmp_path / "bundle", state=state)
    assert list(tmp_path.iterdir()) == []


def test_loading_leaves_the_random_state_alone(bundle: Bundle) -> None:
    before = torch.get_rng_state()
    Bundle.load(bundle.folder).model()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["config.yaml", "model.safetensors", "items.parquet", "metrics.json", "README.md"])
def test_a_changed_file_is_refused_by_name(bundle: Bundle, name: str) -> None:
    path = bundle.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(BundleError, match=f"{bundle.folder}: {name} does not match"):
        Bundle.load(bundle.folder)


@pytest.mark.parametrize("name", ["model.safetensors", "training.png", "manifest.json"])
def test_a_missing_file_is_refused_by_name(bundle: Bundle, name: str) -> None:
    (bundle.folder / name).unlink()
    with pytest.raises(BundleError, match=name):
        Bundle.load(bundle.folder)


def test_a_required_file_must_be_listed(bundle: Bundle) -> None:
    (bundle.folder / "metrics.json").unlink()
    relist(bundle.folder)
    with pytest.raises(BundleError, match=r"metrics\.json is missing"):
        Bundle.load(bundle.folder)


def test_strange_company_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    stranger = bundle.folder / "notes.txt"
    stranger.write_text("hello")
    with pytest.raises(BundleError, match=r"notes\.txt is not listed"):
        Bundle.load(bundle.folder)
    stranger.unlink()
    stranger.mkdir()
    with pytest.raises(BundleError, match=r"notes\.txt is not a plain file"):
        Bundle.load(bundle.folder)
    stranger.rmdir()
    stranger.symlink_to(bundle.folder / "README.md")
    with pytest.raises(BundleError, match=r"notes\.txt is not a plain file"):
        Bundle.load(bundle.folder)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_is_refused_even_when_listed(bundle: Bundle, protocol: int) -> None:
    (bundle.folder / "extra.json").write_bytes(pickle.dumps({"a": 1}, protocol=protocol))
    relist(bundle.folder)
    with pytest.raises(BundleError, match=r"extra\.json is a pickle"):
        Bundle.load(bundle.folder)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pt", "a.json"])
def test_a_torch_file_is_refused_under_any_name(bundle: Bundle, name: str) -> None:
    torch.save({"a": torch.zeros(1)}, bundle.folder / name)
    relist(bundle.folder)
    with pytest.raises(BundleError, match=f"{name} is a pickle"):
        Bundle.load(bundle.folder)


def test_a_safetensors_header_may_start_like_a_pickle(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x280)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    assert (tmp_path / "model.safetensors").read_bytes().startswith(b"\x80\x02")
    write_manifest(tmp_path, {}, ["model.safetensors"])
    assert list(verify_manifest(tmp_path)["files"]) == ["model.safetensors"]


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"format_version": 2, "files": {}}', '{"format_version": 1}', "[" * 100_000]
)
def test_a_broken_manifest_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.folder / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.load(bundle.folder)


def test_no_folder_is_a_bundle_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Bundle.load(tmp_path / "absent")


def test_weights_must_fit_the_items(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"items\.embedding\.weight is .*\(31, 16\).*29 items.*needs .*\(30, 16\)"):
        save_tiny(tmp_path / "bundle", items=tiny_items(29))


def test_weights_must_have_the_names_of_the_model(tmp_path: Path) -> None:
    state = tiny_state(tiny_config())
    state["surprise"] = state.pop("norm.bias")
    with pytest.raises(BundleError, match=r"missing \['norm\.bias'\], unknown \['surprise'\]"):
        save_tiny(tmp_path / "bundle", state=state)


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (tiny_items().drop_columns(["train_events"]), "train_events"),
        (tiny_items().set_column(0, "item_id", pa.array(["a"] * NUM_ITEMS)), "same id"),
        (tiny_items().set_column(0, "item_id", pa.array([None, *map(str, range(1, NUM_ITEMS))])), "nulls"),
        (tiny_items().set_column(1, "train_events", pa.array(np.ones(NUM_ITEMS))), "whole numbers"),
    ],
)
def test_the_item_table_is_checked(tmp_path: Path, items: pa.Table, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        save_tiny(tmp_path / "bundle", items=items)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("type: sasrec", "type: planted:Thing"),
        lambda text: text.replace("type: softmax", "type: planted:Thing"),
        lambda text: text.replace("space: {}", "space: {model.type: {choice: ['planted:Thing']}}"),
    ],
)
def test_code_that_a_bundle_names_is_not_run(bundle: Bundle, tmp_path: Path, monkeypatch, change) -> None:
    (tmp_path / "planted.py").write_text("raise SystemExit('the code ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = bundle.folder / "config.yaml"
    changed = change(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed)
    relist(bundle.folder)
    with pytest.raises(BundleError, match="planted:Thing"):
        Bundle.load(bundle.folder)
    assert "planted" not in sys.modules


def test_code_that_is_trusted_runs(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "own_model.py").write_text(
        "from typing import Literal\n"
        "from seqray.models.sasrec import SASRec\nfrom seqray.model_sections import SASRecConfig\n"
        "class OwnConfig(SASRecConfig):\n    type: Literal['own_model:Own'] = 'own_model:Own'\n"
        "class Own(SASRec):\n    Config = OwnConfig\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sizes = {f"model.{key}": value for key, value in tiny_config().model if key != "type"}
    config = tiny_config().override({"model.type": "own_model:Own", **sizes})
    saved = save_tiny(tmp_path / "bundle", config=config)
    with pytest.raises(BundleError, match="own_model:Own"):
        Bundle.load(saved.folder)
    loaded = Bundle.load(saved.folder, trusted=("own_model:Own",))
    assert type(loaded.model()).__name__ == "Own"
