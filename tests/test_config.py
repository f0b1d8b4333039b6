import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from seqray.command import run_command, write_json
from seqray.config import Config, load_config
from seqray.errors import ConfigError
from seqray.model_sections import SASRecConfig
from seqray.sections import BCEConfig, SoftmaxConfig
from seqray.yaml_file import dump_yaml, parse_yaml

ROOT = Path(__file__).resolve().parents[1]
SMALL = "name: shop\ndata:\n  path: log.parquet\n"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_config(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_two_lines_are_a_config(write: Any) -> None:
    config = load_config(write(SMALL))
    assert config.data.store == ".seqray/stores/shop"
    assert config.model == SASRecConfig()
    assert config.loss == SoftmaxConfig()
    assert config.train.num_workers == 1
    assert load_config(write(SMALL), ("output=s3://bucket/x",)).data.store == "s3://bucket/x/stores/shop"


def test_overrides_are_yaml_at_dotted_paths(write: Any) -> None:
    config = load_config(
        write(SMALL),
        ("train.learning_rate=1e-3", "evaluate.k=[20, 10]", "data.items.path=items.csv", "train.clip_norm=null",
         "model={type: sasrec, hidden_dim: 8}", "data.columns.user_id=a=b"),
    )  # fmt: skip
    assert config.train.learning_rate == 0.001
    assert config.evaluate.k == (10, 20)
    assert config.data.items is not None
    assert config.data.items.path == "items.csv"
    assert config.train.clip_norm is None
    assert isinstance(config.model, SASRecConfig)
    assert config.model.hidden_dim == 8
    assert config.data.columns.user_id == "a=b"


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("-2E+3", -2000.0), ("1.5e3", 1500.0), ("1e", "1e"), ("12", 12), ("yes", True), ("1e3x", "1e3x")],
)
def test_numbers_in_yaml(text: str, value: Any) -> None:
    found = parse_yaml(f"x: {text}", "text")["x"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learnin_rate=1", "train.learnin_rate: unknown key; nearest: train.learning_rate"),
        ("train.lr=1", "nearest: train.learning_rate"),
        ("lr=1", "nearest: train.learning_rate"),
        ("model.d_model=8", "nearest: model.hidden_dim"),
        ("hidden_dim=8", "nearest: model.hidden_dim"),
        ("trian.epochs=3", "nearest: train.epochs"),
        ("data.colums.user_id=u", "nearest: data.columns.user_id"),
        ("data.items.titel=t", "nearest: data.items.title"),
        ("epochs", "override 'epochs' is not of the form path=value"),
        ("train.epochs=[", "override train.epochs: not YAML"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1 (given: 0)"),
        ("train.epochs=many", "train.epochs: Input should be a valid integer"),
        ("train.learning_rate=.nan", "train.learning_rate: Input should be a finite number"),
        ("train=5", "train: Input should be a valid dictionary"),
        ("model=5", "model: 5 is not a section"),
        ("data.path=null", "data.path"),
        ("name=a/b", "name 'a/b': letters, digits"),
        ("name=../up", "name '../up'"),
        ("model.type=sasrek", "model.type: 'sasrek' is neither one of sasrec"),
        ("model.type=no_such_module:Model", "model.type: cannot load 'no_such_module:Model'"),
        ("model.type=pathlib:Path", "model.type: 'pathlib:Path' has no nested class Config"),
        ("loss.type=bcee", "is neither one of softmax, sampled_softmax, bce"),
        ("data.split.type=random", "data.split.type: Input should be 'leave_one_out' or 'temporal'"),
    ],
)
def test_a_mistake_names_its_path_and_the_choices(write: Any, override: str, expected: str) -> None:
    assert expected in message(write(SMALL), override)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("model.hidden_dim=10", "model.num_heads=4"), "model: hidden_dim 10 is not a multiple of num_heads 4"),
        (("train.monitor=val/ndcg@7",), "train.monitor 'val/ndcg@7' is not computed; choices: val/hit_rate@5"),
        (("evaluate.k=[5, 5]",), "evaluate.k: k holds different numbers"),
        (("evaluate.k=[0]",), "evaluate.k: k holds different numbers from 1 up"),
        (("serve.min_replicas=3",), "serve: min_replicas 3 is above max_replicas 2"),
        (("data.tie_order=column",), "data: tie_column goes with tie_order: column"),
        (("data.tie_column=row",), "data: tie_column goes with tie_order: column"),
        (("data.split.type=temporal",), "temporal needs either test_fraction or both"),
        (("data.split.test_fraction=0.1",), "belong to type: temporal"),
        (("data.split={type: temporal, test_cut: 2011-09-01}",), "temporal needs either"),
        (("data.split={type: temporal, test_cut: 2011-09-01, validation_cut: 2011-09-02}",), "validation_cut must be"),
        (("data.split={type: temporal, test_fraction: 0.1}", "data.columns.timestamp=null"), "needs columns.timestamp"),
    ],
)
def test_rules_between_fields_are_checked_on_load(write: Any, overrides: tuple[str, ...], expected: str) -> None:
    assert expected in message(write(SMALL), *overrides)


def test_all_problems_of_a_file_are_told_at_once(write: Any) -> None:
    path = write(SMALL + "train:\n  epochs: 0\n  warm_up: 3\nmodel:\n  heads: 2\nserv: {}\n")
    lines = message(path).splitlines()
    assert len(lines) == 4
    assert all(line.startswith(f"{path}: ") for line in lines)
    assert f"{path}: model.heads: unknown key; nearest: model.num_heads" in lines
    assert f"{path}: train.warm_up: unknown key; nearest: train.warmup_steps" in lines
    assert f"{path}: serv: unknown key; nearest: serve" in lines


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SMALL + "name: again\n", "key 'name' is given twice"),
        (SMALL + "train:\n  epochs: 1\n  epochs: 2\n", "key 'epochs' is given twice"),
        ("- a\n", "a config is a mapping of sections, this is list"),
        ("", "this is NoneType"),
        ("a: [", "not YAML"),
        (SMALL + "train: !!python/object/apply:os.getcwd []\n", "not YAML"),
        ("name: shop\n", "data: required, but not given"),
        ("name: shop\ndata: {}\n", "data.path: required, but not given"),
    ],
)
def test_a_file_that_is_no_config(write: Any, text: str, expected: str) -> None:
    path = write(text)
    assert message(path).startswith(str(path))
    assert expected in message(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert f"{tmp_path / 'no.yaml'}: cannot read the config" in message(tmp_path / "no.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "cannot read the config" in message(tmp_path / "binary.yaml")
    assert "cannot read the config" in message(tmp_path)


def test_the_search_space_is_checked_against_the_tree(write: Any) -> None:
    path = write(SMALL)
    good = "tune.space={train.learning_rate: {loguniform: [1e-4, 1e-2]}, model.hidden_dim: {choice: [8, 16]}}"
    assert set(load_config(path, (good,)).tune.space) == {"train.learning_rate", "model.hidden_dim"}
    assert load_config(path, (good, "tune.space={}")).tune.space == {}
    one = load_config(path, ("tune.space.train.batch_size={randint: [1, 9]}",)).tune.space["train.batch_size"]
    assert one.examples() == (1, 9)
    for space, expected in {
        "train.epoks={randint: [1, 2]}": "tune.space: train.epoks: unknown key; nearest: train.epochs",
        "serve.port={randint: [1, 2]}": "tune.space.serve.port: cannot be searched",
        "train.batch_size={choice: [3, 0]}": "train.batch_size = 0: train.batch_size: Input should be greater",
        "model.num_heads={choice: [1, 3]}": "hidden_dim 64 is not a multiple of num_heads 3",
        "train.batch_size={coice: [3]}": "unknown key; nearest: tune.space.train.batch_size.choice",
        "train.batch_size={choice: [3], randint: [1, 2]}": "needs exactly one of choice, uniform, loguniform, randint",
        "train.batch_size={randint: [3, 3]}": "randint: the lower bound 3 is not below 3",
        "train.learning_rate={loguniform: [0, 1]}": "loguniform: bounds must be above 0",
        "train.batch_size={choice: []}": "tune.space.train.batch_size.choice",
        "train.epochs={choice: [3]}": "tune.space.train.epochs: cannot be searched",
        "model.hidden_dim={uniform: [16, 64]}": "model.hidden_dim: Input should be a valid integer",
        "train.betas={choice: [[0.9, 1.0]]}": "train.betas.1: Input should be less than 1",
    }.items():
        assert expected in message(path, f"tune.space.{space}")
    assert "tune.space: Input should be a valid dictionary" in message(path, "tune.space=5")


def test_another_component_brings_its_own_keys(write: Any) -> None:
    path = write(SMALL + "loss: {type: softmax, chunk_elements: 100}\n")
    config = load_config(path, ("loss.num_negatives=3", "loss.type=bce"))
    assert config.loss == BCEConfig(num_negatives=3)
    assert load_config(path, ("loss.type=softmax",)).loss == SoftmaxConfig(chunk_elements=100)
    assert load_config(path).override({"loss.type": "bce"}).loss == BCEConfig()
    assert load_config(path, ("tune.space.loss.type={choice: [bce, softmax]}",)).tune.space
    assert "loss.num_negatives: unknown key; nearest: loss.chunk_elements" in message(path, "loss.num_negatives=3")


def test_a_component_of_ones_own(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_shop_model.py").write_text(
        "from typing import Literal\nfrom seqray.sections import Component\n"
        "class Gru:\n    class Config(Component):\n        layers: int = 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = write(SMALL + "model: {type: 'my_shop_model:Gru', layers: 3}\n")
    config = load_config(path)
    assert config.plain()["model"] == {"type": "my_shop_model:Gru", "layers": 3}
    assert Config.parse(config.plain()) == config
    assert "model.layer: unknown key; nearest: model.layers" in message(path, "model.layer=2")


def test_plain_data_yaml_and_overrides_give_the_same_tree_again(write: Any) -> None:
    split = "data.split={type: temporal, test_cut: 2011-09-01T00:00:00Z, validation_cut: 2011-08-01}"
    space = "tune.space.train.learning_rate={loguniform: [1e-4, 1e-2]}"
    config = load_config(write(SMALL), (split, space, "model.dropout=0.1", "data.path=[a.csv, b.csv]"))
    assert Config.parse(config.plain()) == config
    assert Config.parse(parse_yaml(config.yaml(), "yaml")) == config
    assert config.override({}) == config
    changed = config.override({"train.learning_rate": 0.5, "model.hidden_dim": 8})
    assert changed.train.learning_rate == 0.5
    assert config.train.learning_rate == 0.001
    assert changed.override({"train.learning_rate": 0.001, "model.hidden_dim": 64}) == config
    with pytest.raises(ConfigError, match=r"override: train\.lr: unknown key"):
        config.override({"train.lr": 1})


def test_the_tree_is_frozen(write: Any) -> None:
    config = load_config(write(SMALL))
    with pytest.raises(ValueError, match="frozen"):
        config.train.epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    config = load_config(path)
    assert Config.parse(config.plain()) == config
    assert load_config(path, ("data.path=elsewhere.csv",)).data.path == "elsewhere.csv"


def test_a_command_prints_the_resolved_config(write: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(SMALL)
    status = run_command("x", "about", lambda *_: pytest.fail("ran"), argv=[str(path), "train.epochs=3", "--dry-run"])
    assert status == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_config(again) == load_config(path, ("train.epochs=3",))


def test_a_command_answers_2_to_wrong_input(write: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(_config: Config, _arguments: Any) -> None:
        raise ConfigError("mine")

    assert run_command("x", "about", fails, argv=[str(write(SMALL))]) == 2
    assert capsys.readouterr().err == "error: mine\n"


def test_a_typo_is_answered_without_traceback_torch_or_ray(write: Any) -> None:
    code = (
        "import sys\nfrom seqray.command import run_command\n"
        "status = run_command('train', 'about', lambda *_: None, argv=sys.argv[1:])\n"
        "print(sorted({'torch', 'ray', 'numpy', 'pyarrow'} & set(sys.modules)))\nsys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(write(SMALL)), "train.epoks=3"], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == "[]\n"
    assert done.stderr == "error: override: train.epoks: unknown key; nearest: train.epochs\n"


def test_json_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "x.json"
    write_json(target, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(target, {"a": float("nan")})
    assert target.read_text() == '{\n "a": 1\n}\n'
    assert [path.name for path in target.parent.iterdir()] == ["x.json"]


def test_yaml_keeps_the_order_and_the_letters() -> None:
    assert dump_yaml({"b": "größe", "a": [1, None]}) == "b: größe\na:\n- 1\n- null\n"


@pytest.mark.parametrize("given", ["two", [1], [0, 2], [3, 2], [1, 2, 3], -1, 5000, True, 2.5])
def test_a_number_of_workers_that_cannot_be_is_answered_with_what_can(given: object) -> None:
    with pytest.raises(ConfigError, match=r"train.num_workers: .*\[least, most\]"):
        Config.parse({"name": "x", "data": {"path": "log.csv"}, "train": {"num_workers": given}})


def test_an_elastic_number_of_workers_keeps_its_bounds() -> None:
    config = Config.parse({"name": "x", "data": {"path": "log.csv"}, "train": {"num_workers": [2, 8]}})
    assert (config.train.min_workers, config.train.max_workers) == (2, 8)
    assert Config.parse(config.plain()) == config
    with pytest.raises(ConfigError, match="vocabulary_parallel is 1"):
        config.override({"train.vocabulary_parallel": 2})
