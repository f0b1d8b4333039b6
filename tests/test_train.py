"""Training in one process: resume to the last bit, which run is continued, and what the run leaves behind."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from shop_log import shop_config
from struck import job_of, run_workers

from seqray.bundle import Bundle
from seqray.catalogue import Catalogue
from seqray.config import Config
from seqray.errors import BundleError, ConfigError, DataError, ModelError
from seqray.evaluation import model_scorer
from seqray.folder import Folder
from seqray.models.protocol import build_model
from seqray.recommender import Query, Recommender
from seqray.vocabulary import ItemVocabulary
from train.evaluate import evaluate_rows
from train.finite import TrainingError
from train.fit import Trial, fit
from train.optimizer import learning_rate
from train.prefetch import prefetched
from train.prepare import ensure_store
from train.runs import Run
from train.warm_start import start_from_bundle


class PowerCut(Exception):
    """Ends a run from outside the training code."""


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return load_file(bundle.folder / "model.safetensors")


def assert_same(one: Bundle, other: Bundle) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    drop = ("train_seconds", "restarts", "wasted_steps")
    assert {k: v for k, v in one.metrics.items() if k not in drop} == {
        k: v for k, v in other.metrics.items() if k not in drop
    }


def cut_after(validations: int) -> Trial:
    """A trial whose process dies after some validations."""
    left = [validations]

    def on_validation(metrics: object) -> None:
        left[0] -= 1
        if not left[0]:
            raise PowerCut

    return Trial("t1", Folder.at(""), on_validation)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_resumed_run_equals_an_unbroken_one_to_the_last_bit(tmp_path: Path, dropout: float) -> None:
    config = shop_config(tmp_path, model={"dropout": dropout}, loss={"type": "bce"})
    unbroken = fit(config)
    trial = cut_after(2)
    search = tmp_path / "search"
    with pytest.raises(PowerCut):
        fit(config, trial=Trial("t1", Folder.at(search), trial.on_validation))
    log = search / "trials" / "t1" / "train.log"
    resumed = fit(config, trial=Trial("t1", Folder.at(search)))
    assert "goes on from checkpoint" in log.read_text()
    assert_same(unbroken, resumed)


def test_training_beats_popularity_and_fills_the_bundle(tmp_path: Path) -> None:
    bundle = fit(shop_config(tmp_path, train={"epochs": 12}))
    assert bundle.metrics["test/ndcg@10"] > 2 * bundle.metrics["baselines"]["popularity"]["test/ndcg@10"]
    assert set(bundle.metrics["baselines"]) == {"popularity", "windowed_popularity", "markov_1", "personal_frequency"}
    files = {"config.yaml", "model.safetensors", "items.parquet", "metrics.json", "manifest.json", "README.md"}
    assert {path.name for path in bundle.folder.iterdir()} == files | {"training.png"}


def test_a_finished_run_is_never_touched_again(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    first = fit(config)
    before = {path: path.read_bytes() for path in first.folder.iterdir()}
    second = fit(config)
    assert second.folder != first.folder
    assert before == {path: path.read_bytes() for path in first.folder.iterdir()}
    assert all(torch.equal(a, b) for a, b in zip(weights(first).values(), weights(second).values(), strict=True))


def start_and_leave(config: Config) -> Run:
    """An unfinished run of `config`, as a killed command leaves it behind."""
    root = Path(config.output) / "runs" / config.name
    run = Run.load(fit(config).folder.parents[2] / "runs" / config.name / next(root.iterdir()).name)
    bundle = Path(config.output) / "bundles" / config.name / run.id
    for path in bundle.iterdir():
        path.unlink()
    bundle.rmdir()
    return run.mark("unfinished")


def test_a_changed_config_under_an_unfinished_name_is_refused_with_the_difference(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    run = start_and_leave(config)
    with pytest.raises(ConfigError, match=re.escape("train.learning_rate: 0.01 -> 0.02")) as error:
        fit(config.override({"train.learning_rate": 0.02}))
    assert run.id in str(error.value)
    assert "--fresh" in str(error.value)


def test_changed_data_under_an_unfinished_name_is_refused(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    start_and_leave(config)
    from shop_log import write_log

    write_log(tmp_path, num_users=50)
    with pytest.raises(ConfigError, match="content of the prepared store"):
        fit(config)


def test_what_does_not_decide_the_result_may_change(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    run = start_and_leave(config)
    bundle = fit(config.override({"train.checkpoint_steps": 1, "serve.port": 9000}))
    assert bundle.folder.name == run.id
    assert Run.load(run.folder).status == "finished"


def test_fresh_leaves_the_unfinished_run_alone(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    run = start_and_leave(config)
    assert fit(config, fresh=True).folder.name != run.id
    assert Run.load(run.folder).status == "abandoned"


def test_a_run_that_finished_meanwhile_is_not_opened_again(tmp_path: Path) -> None:
    run = start_and_leave(shop_config(tmp_path, train={"epochs": 1}))
    run.mark("finished")
    with run.lock(), pytest.raises(ConfigError, match="has finished this run"):
        run.next_attempt()
    assert Run.load(run.folder).status == "finished"


def test_a_second_command_on_the_same_run_is_refused(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    run = start_and_leave(config)
    with run.lock(), pytest.raises(ConfigError, match="another command"):
        fit(config)
    assert Run.load(run.folder).attempt == run.attempt


@pytest.mark.parametrize("damage", ["torn", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = shop_config(tmp_path, train={"epochs": 3})
    unbroken = fit(config)
    run = start_and_leave(config.override({"name": "damaged"}))
    newest = sorted((run.folder.path / "checkpoints").glob("step_*"))[-1]
    file = newest / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-8] if damage == "torn" else content[:-1] + bytes([content[-1] ^ 1]))
    capsys.readouterr()
    resumed = fit(config.override({"name": "damaged"}))
    printed = capsys.readouterr().out
    assert f"checkpoint passed over: {newest.name}" in printed
    assert "model.safetensors" in printed
    assert "goes on from checkpoint" in printed
    assert_same(unbroken, resumed)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    config = shop_config(tmp_path, model={"type": "broken_models:Explodes", "max_length": 8})
    with pytest.raises(TrainingError, match="epoch 1"):
        fit(config)


def test_early_stopping_keeps_the_best_weights(tmp_path: Path) -> None:
    bundle = fit(shop_config(tmp_path, train={"epochs": 60, "patience": 2, "learning_rate": 0.05}))
    history = Run.load(next((tmp_path / "out" / "runs" / "shop").iterdir())).folder.path / "checkpoints"
    progress = json.loads((sorted(history.glob("step_*"))[-1] / "progress.json").read_text())
    values = [row["val/ndcg@10"] for row in progress["history"]]
    assert bundle.metrics["epochs"] < 60
    assert max(values) == bundle.metrics["val/ndcg@10"] == values[bundle.metrics["best_epoch"] - 1]
    assert len(values) == bundle.metrics["best_epoch"] + 2


def test_learning_rate_schedules() -> None:
    assert [learning_rate(s, 10, 1.0, 4, "constant") for s in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert learning_rate(7, 10, 1.0, 4, "linear") == pytest.approx(0.5)
    assert learning_rate(7, 10, 1.0, 4, "cosine") == pytest.approx(0.5)
    assert learning_rate(10, 10, 1.0, 4, "cosine") == pytest.approx(0.0)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_killed_command_goes_on_from_its_last_checkpoint(tmp_path: Path, workers: int) -> None:
    config = shop_config(
        tmp_path, train={"epochs": 150, "patience": 150, "checkpoint_steps": 20, "num_workers": workers}
    )
    path = tmp_path / "config.yaml"
    path.write_text(config.yaml())
    command = [sys.executable, "-m", "train", str(path), "--json", str(tmp_path / "result.json")]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    root = tmp_path / "out" / "runs" / "shop"
    deadline = time.monotonic() + 200
    while not list(root.glob("*/checkpoints/step_*")):
        assert first.poll() is None and time.monotonic() < deadline, first.communicate()[0]
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    second = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True)
    assert "continues run" in second.stdout
    assert "goes on from checkpoint" in second.stdout
    result = json.loads((tmp_path / "result.json").read_text())
    resumed = Bundle.load(Path(result["bundle"]))
    assert f"serve.bundle={resumed.folder}" in second.stdout
    unbroken = job_of(config.override({"name": "unbroken"}), tmp_path)
    assert run_workers(unbroken.plain(), max(1, workers), tmp_path) == [None] * max(1, workers)
    assert_same(Bundle.load(unbroken.bundle), resumed)


@pytest.mark.slow
def test_wandb_that_is_away_for_the_whole_run_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    config = shop_config(tmp_path)
    away = fit(config.override({"name": "away", "tracking.mode": "online"}))
    assert "W&B did not start; this run is recorded offline, later: wandb sync" in capfd.readouterr().out
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert_same(fit(config), away)


def test_evaluate_prints_the_row_of_the_run_and_the_same_baselines(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 2})
    bundle = fit(config)
    rows = evaluate_rows(config.override({"evaluate.bundle": str(bundle.folder)}))
    assert rows["sasrec"] == {key: value for key, value in bundle.metrics.items() if key.startswith("test/")}
    for name, metrics in bundle.metrics["baselines"].items():
        assert rows[name].items() <= metrics.items()
    validated = evaluate_rows(config.override({"evaluate.bundle": str(bundle.folder), "evaluate.split": "val"}))
    assert validated["sasrec"]["val/ndcg@10"] == bundle.metrics["val/ndcg@10"]


def test_a_bundle_over_other_items_is_refused(tmp_path: Path) -> None:
    bundle = fit(shop_config(tmp_path, train={"epochs": 1}))
    fewer = shop_config(tmp_path, name="fewer", data={"drop_items": ["105"]}, evaluate={"bundle": str(bundle.folder)})
    with pytest.raises(BundleError, match="other items"):
        evaluate_rows(fewer)


def test_init_from_matches_items_by_id_and_names_the_parent(tmp_path: Path) -> None:
    parent = fit(shop_config(tmp_path, data={"drop_items": ["100", "107"]}, name="parent"))
    config = shop_config(tmp_path, name="child").override({"train.init_from": str(parent.folder)})
    store = ensure_store(config)
    model = build_model(config.model, store.catalogue)
    before = model.item_weights().detach().clone()
    assert start_from_bundle(model, parent, store.vocabulary) == 18
    for row in range(1, store.num_items + 1):
        old = parent.vocabulary.index(store.vocabulary.item_id(row))
        expected = parent.model().item_weights()[old] if old else before[row]
        assert torch.equal(model.item_weights()[row], expected)
    assert torch.equal(model.state_dict()["norm.weight"], parent.state["norm.weight"])
    child = fit(config)
    assert child.manifest["parent"] == parent.manifest["run_id"]
    wider = config.override({"name": "wider", "model.hidden_dim": 32})
    with pytest.raises(BundleError, match=r"items\.embedding"):
        fit(wider)


def test_a_model_that_diverged_gets_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="learning_rate"):
        fit(shop_config(tmp_path, train={"learning_rate": 1e10, "epochs": 1, "batch_size": 1000}))
    assert not (tmp_path / "out" / "bundles").exists()


def test_a_run_that_has_learnt_nothing_does_not_stand_in_the_way(tmp_path: Path) -> None:
    config = shop_config(tmp_path, train={"epochs": 1})
    with pytest.raises(BundleError, match="nowhere"):
        fit(config.override({"train.init_from": str(tmp_path / "nowhere")}))
    assert fit(config).metrics["epochs"] == 1


def test_a_split_without_validation_targets_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [1, 1, 2, 2], "item_id": [1, 2, 2, 1]}), tmp_path / "log.parquet")
    with pytest.raises(DataError, match="no validation target"):
        fit(shop_config(tmp_path, data={"columns": {"timestamp": None}}))


def test_warm_start_does_not_take_positions_for_items(tmp_path: Path) -> None:
    sizes = {"max_length": 21}  # as many positions as items and padding
    parent = fit(shop_config(tmp_path, name="parent", model=sizes, train={"epochs": 1}))
    model = build_model(parent.config.model, Catalogue(20))
    reversed_ids = ItemVocabulary(parent.items.column("item_id").to_pylist()[::-1])
    assert start_from_bundle(model, parent, reversed_ids) == 20
    assert torch.equal(model.state_dict()["position_embedding.weight"], parent.state["position_embedding.weight"])
    assert torch.equal(model.item_weights()[1], parent.state["items.embedding.weight"][20])


KINDS = {"103": ["round", "red"], "104": ["flat"], "105": ["new"], "106": None}


def featured(folder: Path, name: str, kinds: dict[str, list[str] | None], types: list[str]) -> Config:
    """A shop with event types and an item table, whose items are round unless `kinds` says something else."""
    config = shop_config(folder)
    log = pq.read_table(config.data.path)
    events = ["view" if number % 3 else "buy" for number in range(log.num_rows)]
    pq.write_table(log.append_column("what", [events]), folder / "typed.parquet")
    ids = [str(number) for number in range(100, 120)]
    rows = pa.table({"item_id": ids, "kinds": [kinds.get(item_id, ["round"]) for item_id in ids]})
    pq.write_table(rows, folder / f"{name}.parquet")
    return shop_config(
        folder, name=name, train={"epochs": 1},
        data={
            "path": str(folder / "typed.parquet"), "columns": {"event": "what"}, "event_types": types,
            "items": {"path": str(folder / f"{name}.parquet")},
        },
        model={"event_type": True, "time_gap": True, "separate_output": True, "item_columns": [{"column": "kinds"}]},
    )  # fmt: skip


def test_warm_start_matches_categories_and_event_types_by_their_text(tmp_path: Path) -> None:
    parent = fit(featured(tmp_path, "parent", KINDS, ["view", "buy"]))
    config = featured(tmp_path, "child", {**KINDS, "105": ["blue"]}, ["sell", "buy", "view"])
    store = ensure_store(config)
    model = build_model(config.model, store.catalogue)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert start_from_bundle(model, parent, store.vocabulary) == 20
    state, old = model.state_dict(), parent.state
    kinds, events = state["items.columns.0.weight"], state["events.event.weight"]
    # Rows: blue flat red round, after flat new red round; sell buy view, after view buy.
    assert torch.equal(kinds[2:], old["items.columns.0.weight"][[1, 3, 4]])
    assert torch.equal(kinds[1], before["items.columns.0.weight"][1])
    assert torch.equal(events[2:], old["events.event.weight"][[2, 1]])
    assert torch.equal(events[1], before["events.event.weight"][1])
    for name in ("items.embedding.weight", "items.output.weight", "events.gap.weight", "position_embedding.weight"):
        assert torch.equal(state[name], old[name])


def test_a_column_that_the_item_table_lacks_is_told_before_training(tmp_path: Path) -> None:
    config = featured(tmp_path, "shop", KINDS, ["view", "buy"])
    path = tmp_path / "config.yaml"
    path.write_text(config.override({"model.item_columns": [{"column": "kind"}]}).yaml())
    command = [sys.executable, "-m", "train", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: model.item_columns: no column 'kind' in the item table")
    assert "kinds" in done.stderr
    assert fit(config).metrics["epochs"] == 1


def test_offline_answers_are_those_that_were_evaluated(tmp_path: Path) -> None:
    """Log, store, training, bundle and query agree on event types and times, to the last score."""
    config = featured(tmp_path, "shop", KINDS, ["view", "buy"])
    bundle, store = fit(config), ensure_store(config)
    test = store.queries("test")
    expected = model_scorer(bundle.model(), torch.device("cpu"))(test)
    names = [None, *config.data.event_types]
    assert store.event_types is not None
    queries = []
    for begin, cut in zip(test.begin, test.cut, strict=True):
        history = tuple(store.vocabulary.item_id(item) for item in store.items[begin:cut])
        times = tuple(float(time) / 1e6 for time in store.timestamps[begin:cut])
        events = tuple(names[kind] for kind in store.event_types[begin:cut])
        queries.append(
            Query(history, 20, (), False, events=events, timestamps=times, now=float(store.timestamps[cut]) / 1e6)
        )
    for answer, scores in zip(Recommender(bundle).recommend(queries), expected, strict=True):
        found = torch.zeros(21)
        for item in answer.items:
            found[store.vocabulary.index(item.item_id)] = item.score
        torch.testing.assert_close(found[1:], scores[1:], atol=1e-5, rtol=1e-5)


def test_a_result_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(shop_config(tmp_path).yaml())
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "train", str(path), "--json", str(tmp_path / "file" / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --json: cannot write")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("ahead", [False, True])
def test_prefetched_steps_come_in_order_and_with_their_errors(ahead: bool) -> None:
    assert list(prefetched(str, range(3, 7), ahead)) == ["3", "4", "5", "6"]
    assert list(prefetched(str, range(0), ahead)) == []
    steps = prefetched(lambda number: 1 // (2 - number), range(5), ahead)
    assert [next(steps), next(steps)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(steps)
