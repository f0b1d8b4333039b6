"""The configuration tree: one frozen pydantic model for all commands, written as YAML, changed by dotted paths.

Free of PyTorch and Ray, so that a mistake is answered at once. The sentence under a field is its documentation.
"""

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from seqray.component import DEFAULT, config_class
from seqray.config_errors import nearest_key, unknown_key_message
from seqray.errors import ConfigError
from seqray.sections import Component, SASRecConfig, Section, SoftmaxConfig
from seqray.yaml_file import dump_yaml, parse_yaml, read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ColumnsConfig(Section):
    """Our column names -> the names in the log."""

    user_id: str = "user_id"
    """Column of the user."""
    item_id: str = "item_id"
    """Column of the item."""
    timestamp: str | None = "timestamp"
    """Column of the time (number, date or text); null when the rows of the log are in order already."""
    basket: str | None = None
    """Column that ties the events of one purchase together, such as an invoice number."""


class ItemsConfig(Section):
    """The optional item table; when an item has several rows, the last one counts."""

    path: str
    """File or folder, Parquet, CSV or JSONL; may be the log itself."""
    item_id: str = "item_id"
    """Column of the item."""
    title: str | None = None
    """Column shown as the title; a column named `title` is found by itself."""
    keep: tuple[str, ...] | None = None
    """Other columns to keep; all of them when not given."""


class SplitConfig(Section):
    """How each user's history is divided into training, validation and test."""

    type: Literal["leave_one_out", "temporal"] = "leave_one_out"
    """`leave_one_out`: last event is the test target, the one before it validation. `temporal`: cuts in time."""
    test_cut: datetime | None = None
    """temporal: events from here on are the test period (UTC when no zone is given)."""
    validation_cut: datetime | None = None
    """temporal: events from here to test_cut are the validation period."""
    test_fraction: float | None = Field(None, gt=0, lt=1)
    """temporal, instead of cuts: the newest share of events is the test period, as much before it validation."""
    target: Literal["next_item", "next_basket"] = "next_item"
    """temporal: what is to be found, the first event of the period or all items of its first basket."""

    @field_validator("test_cut", "validation_cut")
    @classmethod
    def _in_utc(cls, cut: datetime | None) -> datetime | None:
        return cut.replace(tzinfo=UTC) if cut is not None and cut.tzinfo is None else cut

    @model_validator(mode="after")
    def _cuts_fit(self) -> Self:
        cuts = (self.test_cut, self.validation_cut)
        if self.type == "leave_one_out":
            if any(cuts) or self.test_fraction or self.target != "next_item":
                raise ValueError("test_cut, validation_cut, test_fraction and next_basket belong to type: temporal")
        elif bool(self.test_fraction) == any(cuts) or (any(cuts) and not all(cuts)):
            raise ValueError("temporal needs either test_fraction or both test_cut and validation_cut")
        elif self.validation_cut and self.test_cut and self.validation_cut >= self.test_cut:
            raise ValueError("validation_cut must be before test_cut")
        return self


class DataConfig(Section):
    """The log, what is taken from it, and where the prepared store goes."""

    path: str | tuple[str, ...]
    """File, folder or several, local or any pyarrow.fs URI (s3://, gs://, hdfs://)."""
    format: Literal["parquet", "csv", "jsonl"] | None = None
    """Taken from the file names when not given."""
    columns: ColumnsConfig = ColumnsConfig()
    """The log's own column names."""
    items: ItemsConfig | None = None
    """Item table, kept in the bundle and returned by the endpoint."""
    timestamp_unit: Literal["s", "ms", "us", "ns"] = "s"
    """Unit of numeric timestamps."""
    timestamp_format: str | None = None
    """strptime format of text timestamps; ISO 8601 when not given."""
    min_user_events: int = Field(1, ge=1)
    """Users with fewer events are left out."""
    min_item_events: int = Field(1, ge=1)
    """Items with fewer events are left out."""
    filter: Literal["k_core", "one_pass"] = "k_core"
    """Repeat both minimums until nothing changes, or apply each once (items, then users)."""
    drop_items: tuple[str, ...] = ()
    """Ids that are no products, such as postage or fees; their events are left out."""
    repeats: Literal["keep", "once_per_basket", "drop"] = "keep"
    """drop: only a user's first event with an item stays; once_per_basket: the first in each basket."""
    tie_order: Literal["file", "shuffle", "column"] = "file"
    """Order of a user's events with equal time: as in the file, shuffled by `seed`, or by `tie_column`."""
    tie_column: str | None = None
    """Column for `tie_order: column`."""
    max_bad_share: float = Field(0.01, ge=0, le=1)
    """Share of rows that may go to quarantine before the command stops."""
    split: SplitConfig = SplitConfig()
    """Training, validation and test."""
    store: str = ""
    """Folder of the prepared store; `<output>/stores/<name>` when not given."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if (self.tie_order == "column") != (self.tie_column is not None):
            raise ValueError("tie_column goes with tie_order: column, and only with it")
        if self.split.type == "temporal" and self.columns.timestamp is None:
            raise ValueError("split.type temporal needs columns.timestamp")
        if self.split.target == "next_basket" and not self.columns.timestamp:
            raise ValueError("split.target next_basket needs columns.timestamp")
        return self


class TrainConfig(Section):
    """Fine-tuning: where it runs, how long, and how the weights move."""

    num_workers: int = Field(1, ge=0, le=4096)
    """Ray Train workers; 0 trains in the command's own process without a cluster."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes a GPU for each worker where the cluster (or this process) has them."""
    cpus_per_worker: int = Field(1, ge=1)
    """CPU cores, and so threads, of one worker."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast where the hardware multiplies bf16."""
    epochs: int = Field(20, ge=1)
    """Passes over the training sequences, at the most."""
    batch_size: int = Field(256, ge=1)
    """Sequences of one optimizer step, over all workers."""
    windows: Literal["last", "all"] = "last"
    """Of a history longer than model.max_length: train on its newest window, or on all of them."""
    learning_rate: float = Field(1e-3, gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Adam's decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (AdamW)."""
    clip_norm: float | None = Field(5.0, gt=0)
    """Gradient norm is clipped to this; null turns it off."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Decay after the warm-up, down to 0 at the last epoch."""
    evaluate_every: int = Field(1, ge=1)
    """Epochs between validations."""
    monitor: str = "val/ndcg@10"
    """Metric that chooses the best weights, stops early, and ranks trials; larger is better."""
    patience: int = Field(5, ge=1)
    """Validations without a better `monitor` before training stops."""
    checkpoint_steps: int = Field(500, ge=1)
    """Optimizer steps between checkpoints."""
    keep_checkpoints: int = Field(2, ge=1)
    """Newest checkpoints kept."""
    max_failures: int = Field(3, ge=0)
    """Times Ray Train starts the workers again after one of them died."""


class EvaluateConfig(Section):
    """Full ranking over the catalogue."""

    k: tuple[int, ...] = Field((5, 10, 20), min_length=1)
    """Cut-offs of hit_rate, ndcg, mrr and coverage."""
    exclude_seen: bool = True
    """Leave items of the history out of the ranking; wrong for purchase logs with repeats."""
    popularity_window_days: float = Field(90.0, gt=0)
    """Window of the windowed popularity baseline."""
    batch_size: int = Field(256, ge=1)
    """Users ranked at a time."""
    bundle: str | None = None
    """Bundle that `python -m train.evaluate` puts beside the baselines."""
    split: Literal["test", "val"] = "test"
    """Targets that `python -m train.evaluate` ranks."""

    @field_validator("k")
    @classmethod
    def _k_positive(cls, k: tuple[int, ...]) -> tuple[int, ...]:
        if min(k) < 1 or len(set(k)) != len(k):
            raise ValueError("k holds different numbers from 1 up")
        return tuple(sorted(k))


class Distribution(Section):
    """What a searched value is drawn from: exactly one key, such as `{loguniform: [1.0e-4, 1.0e-2]}`."""

    choice: tuple[Any, ...] | None = Field(None, min_length=1)
    """One of these values."""
    uniform: tuple[float, float] | None = None
    """A real number between two bounds."""
    loguniform: tuple[float, float] | None = None
    """A real number between two positive bounds, even on the logarithm."""
    randint: tuple[int, int] | None = None
    """A whole number between two bounds, both included."""

    @model_validator(mode="after")
    def _one_key(self) -> Self:
        given = [(key, value) for key, value in self if value is not None]
        if len(given) != 1:
            raise ValueError("needs exactly one of choice, uniform, loguniform, randint")
        key, value = given[0]
        if key != "choice" and not value[0] < value[1]:
            raise ValueError(f"{key}: the lower bound {value[0]} is not below {value[1]}")
        if key == "loguniform" and value[0] <= 0:
            raise ValueError("loguniform: bounds must be above 0")
        return self

    def examples(self) -> tuple[Any, ...]:
        """The values at the ends of the distribution, or all its choices."""
        return next(value for _, value in self if value is not None)


class TuneConfig(Section):
    """Hyperparameter search: each trial is a train run with some values of the tree replaced."""

    space: dict[str, Distribution] = Field(default_factory=dict)
    """Dotted path -> distribution; paths under model, loss and train."""
    num_trials: int = Field(16, ge=1)
    """Trials of the search."""
    search: Literal["optuna", "random"] = "optuna"
    """How the next sample is chosen."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops weak trials early (Li et al. 2020)."""
    grace_validations: int = Field(2, ge=1)
    """asha: validations that every trial gets."""
    reduction_factor: int = Field(3, ge=2)
    """asha: one of this many trials goes on from a rung."""
    max_concurrent: int | None = Field(None, ge=1)
    """Trials at a time; as many as the cluster holds when not given."""


class ServeConfig(Section):
    """The endpoint."""

    bundle: str | None = None
    """Bundle to deploy."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless told otherwise."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where a replica ranks; cuda reserves one GPU for each replica."""
    cpus_per_replica: float = Field(1.0, gt=0)
    """CPU cores of one replica; the model uses as many threads."""
    min_replicas: int = Field(1, ge=0)
    """Replicas kept when idle; 0 scales to zero."""
    max_replicas: int = Field(2, ge=1)
    """Replicas at the most."""
    target_ongoing_requests: float = Field(16.0, gt=0)
    """Requests in flight for each replica that autoscaling aims at."""
    upscale_delay_s: float = Field(2.0, ge=0)
    """Seconds of load above the target before replicas are added."""
    downscale_delay_s: float = Field(60.0, ge=0)
    """Seconds of load below the target before replicas are removed."""
    metrics_interval_s: float = Field(0.5, gt=0)
    """Seconds between the replicas' load reports; Ray's own default of 10 makes autoscaling slow."""
    max_batch_size: int = Field(32, ge=1)
    """Requests ranked in one forward pass."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Requests a replica holds at a time."""
    max_queued_requests: int = Field(128, ge=0)
    """Requests that may wait for a replica; one more is answered 503 with Retry-After."""
    retry_after_s: int = Field(1, ge=1)
    """Seconds in that Retry-After."""
    high_throughput: bool = True
    """Ray Serve's HAProxy ingress and throughput profile."""

    @model_validator(mode="after")
    def _replicas_fit(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self


class TrackingConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when a W&B key is set, else offline (runs land under `<output>/wandb` and sync later)."""
    project: str = "seqray"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""


class ClusterConfig(Section):
    """The Ray cluster that the commands use."""

    address: str | None = None
    """`local` starts one in this process; an address joins it; null joins a running one, else starts one."""


class Config(Section):
    """Everything a run depends on."""

    name: str
    """The experiment: runs, searches, bundles and the served application carry it."""
    seed: int = Field(42, ge=0, lt=2**31)
    """Of data order, initial weights, dropout, negatives and the search."""
    output: str = ".seqray"
    """Folder of stores, runs, searches, bundles and offline W&B runs; on shared storage for several nodes."""
    data: DataConfig
    model: SerializeAsAny[Component] = SASRecConfig()
    loss: SerializeAsAny[Component] = SoftmaxConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    tune: TuneConfig = TuneConfig()
    serve: ServeConfig = ServeConfig()
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name {self.name!r}: letters, digits, dot, dash and underscore, at most 100")
        allowed = [f"val/{m}@{k}" for m in ("hit_rate", "ndcg", "mrr", "recall") for k in self.evaluate.k]
        if self.train.monitor not in allowed:
            raise ValueError(f"train.monitor {self.train.monitor!r} is not computed; choices: {', '.join(allowed)}")
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "config") -> Self:
        """A checked tree from plain data; ConfigError lists every problem with its path."""
        filled = _with_store(data)
        problems: list[str] = []
        for kind, default in DEFAULT.items():
            section = filled.get(kind) or {}
            if not isinstance(section, Mapping):
                raise ConfigError(f"{source}: {kind}: {section!r} is not a section")
            section_class = config_class(kind, str(section.get("type", default)))
            try:
                filled[kind] = section_class.model_validate({"type": section.get("type", default), **section})
            except ValidationError as error:
                problems += _messages(error, (kind,), section_class)
                del filled[kind]
        try:
            config = cls.model_validate(filled)
        except ValidationError as error:
            problems += _messages(error, (), cls)
        if problems:
            raise ConfigError("\n".join(f"{source}: {problem}" for problem in problems))
        config._check_space(source)
        return config

    def plain(self) -> dict[str, Any]:
        """The tree as plain data (JSON types), which `parse` takes back."""
        return self.model_dump(mode="json")

    def yaml(self) -> str:
        """The resolved tree as YAML."""
        return dump_yaml(self.plain())

    def override(self, values: Mapping[str, Any], source: str = "override") -> Self:
        """The tree with values at dotted paths replaced, checked again."""
        data = self.plain()
        for path, value in _types_first(values.items()):
            _set(data, path, value, source)
        return self.parse(data, source)

    def _check_space(self, source: str) -> None:
        for path, distribution in self.tune.space.items():
            if path.split(".")[0] not in ("model", "loss", "train"):
                raise ConfigError(
                    f"{source}: tune.space.{path}: only paths under model, loss and train can be searched"
                )
            bare = {**self.plain(), "tune": {}}
            for value in distribution.examples():
                data = dict(bare)
                _set(data, path, value, f"{source}: tune.space")
                self.parse(data, f"{source}: tune.space.{path} = {value!r}")


def load_config(path: str | Path, overrides: tuple[str, ...] = ()) -> Config:
    """The tree of a YAML file with `path=value` overrides applied; values are read as YAML."""
    data = read_yaml(path)
    values = []
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"override {text!r} is not of the form path=value")
        values.append((key.strip(), parse_yaml(value, f"override {key}")))
    for key, value in _types_first(values):
        _set(data, key, value, "override")
    return Config.parse(data, str(path))


def _with_store(data: Mapping[str, Any]) -> dict[str, Any]:
    filled = {**data}
    section = filled.get("data")
    if isinstance(section, Mapping) and not section.get("store"):
        root = str(filled.get("output", Config.model_fields["output"].default))
        filled["data"] = {**section, "store": f"{root}/stores/{filled.get('name')}"}
    return filled


def _set(data: dict[str, Any], path: str, value: Any, source: str) -> None:
    """Sets `path` in nested plain data, copying the dictionaries on the way; an unknown path is a ConfigError."""
    keys = path.split(".")
    if len(keys) == 2 and keys[0] in DEFAULT and keys[1] == "type" and _type(data, keys[0]) != value:
        data[keys[0]] = {"type": value}  # the values of another component mean nothing to this one
        return
    if keys[:2] != ["tune", "space"] or len(keys) == 2:
        message = unknown_key_message(Config, keys, data)
        if message:
            raise ConfigError(f"{source}: {message}")
    else:
        keys = ["tune", "space", ".".join(keys[2:])]
    for key in keys[:-1]:
        inner = data.get(key)
        data[key] = dict(inner) if isinstance(inner, Mapping) else {}
        data = data[key]
    data[keys[-1]] = value


def _type(data: Mapping[str, Any], kind: str) -> Any:
    section = data.get(kind)
    return section.get("type", DEFAULT[kind]) if isinstance(section, Mapping) else DEFAULT[kind]


def _types_first(values: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    # A component's keys are known once its type is.
    return sorted(values, key=lambda pair: pair[0] not in {f"{kind}.type" for kind in DEFAULT})


def _messages(error: ValidationError, prefix: tuple[str, ...], section: type[Section]) -> list[str]:
    lines = []
    for problem in error.errors(include_url=False):
        keys = [*prefix, *(str(part) for part in problem["loc"])]
        path = ".".join(keys)
        if problem["type"] == "extra_forbidden":
            lines.append(f"{path}: unknown key; nearest: {_nearest(keys, prefix, section)}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: required, but not given")
        else:
            text = problem["msg"].removeprefix("Value error, ")
            shown = "" if isinstance(problem["input"], Mapping | Section) else f" (given: {problem['input']!r})"
            lines.append(f"{path}: {text}{shown}" if path else f"{text}")
    return lines


def _nearest(keys: list[str], prefix: tuple[str, ...], section: type[Section]) -> str:
    if keys[:2] == ["tune", "space"]:
        return ".".join([*keys[:-1], nearest_key(Distribution, keys[-1:], {})])
    return nearest_key(Config, keys, {prefix[0]: section} if prefix else {})
