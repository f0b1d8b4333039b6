"""The configuration tree: one frozen pydantic model for all commands, written as YAML, changed by dotted paths.

Free of PyTorch and Ray, so that a mistake is answered at once. The sentence under a field is its documentation.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from seqray.component import DEFAULT, config_class
from seqray.config_errors import nearest_key, unknown_key_message
from seqray.data_config import DataConfig
from seqray.errors import ConfigError
from seqray.locations import NO_SECRETS, holds_secret, join
from seqray.model_sections import SASRecConfig
from seqray.program_config import (
    ClusterConfig,
    Distribution,
    EvaluateConfig,
    TrackingConfig,
    TrainConfig,
    TuneConfig,
)
from seqray.sections import Component, Section, SoftmaxConfig
from seqray.serve_config import ServeConfig
from seqray.yaml_file import dump_yaml, parse_yaml, read_yaml

NOT_SEARCHED = (
    "train.num_workers", "train.cpus_per_worker", "train.device", "train.monitor", "train.epochs",
    "train.evaluate_every", "train.init_from", "train.checkpoint_steps", "train.keep_checkpoints", "train.max_failures",
    "train.accumulate_steps", "train.activation_checkpointing", "train.parallel", "train.vocabulary_parallel",
    "train.on_nan", "train.max_preemptions", "train.hang_timeout_s", "train.start_timeout_s", "train.resize_interval_s",
)  # fmt: skip
"""What all trials of a search have in common."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


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
        for text in _texts(self.model_dump()):
            if holds_secret(text):
                raise ValueError(f"{text.partition('://')[0]}://...: {NO_SECRETS}")
        metrics = ["hit_rate", "ndcg", "mrr", *["recall"] * (self.data.split.target == "next_basket")]
        allowed = [f"val/{m}@{k}" for m in metrics for k in self.evaluate.k]
        if self.train.monitor not in allowed:
            raise ValueError(f"train.monitor {self.train.monitor!r} is not computed; choices: {', '.join(allowed)}")
        if self.train.vocabulary_parallel > 1 and self.loss.type != "softmax":
            raise ValueError(f"train.vocabulary_parallel works with loss.type softmax, not {self.loss.type}")
        return self

    @classmethod
    def parse(cls, data: Mapping[str, Any], source: str = "config") -> Self:
        """A checked tree from plain data; ConfigError lists every problem with its path."""
        filled = _with_store(data)
        problems: list[str] = []
        for kind, default in DEFAULT.items():
            section = {} if filled.get(kind) is None else filled[kind]
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

    @property
    def component_types(self) -> tuple[str, ...]:
        """The types named here: code of the user's own among them may be imported on the user's word."""
        return (self.model.type, self.loss.type)

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
            if path.split(".")[0] not in ("model", "loss", "train") or path in NOT_SEARCHED:
                raise ConfigError(
                    f"{source}: tune.space.{path}: cannot be searched; choices: paths under model, loss and train, "
                    f"but for {', '.join(NOT_SEARCHED)}"
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
        filled["data"] = {**section, "store": join(root, f"stores/{filled.get('name')}")}
    return filled


def _texts(data: Any) -> Iterator[str]:
    """All texts in plain data."""
    if isinstance(data, str):
        yield data
    elif isinstance(data, Mapping | list | tuple):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from _texts(value)


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
