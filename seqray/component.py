"""From a component's `type` to its class and the class of its section."""

import importlib
import re
from typing import Any

from seqray.errors import ConfigError
from seqray.sections import Component

BUILT_IN: dict[str, dict[str, tuple[str, str]]] = {
    "model": {
        "sasrec": ("seqray.model_sections:SASRecConfig", "seqray.models.sasrec:SASRec"),
        "bsarec": ("seqray.model_sections:BSARecConfig", "seqray.models.bsarec:BSARec"),
        "bert4rec": ("seqray.model_sections:BERT4RecConfig", "seqray.models.bert4rec:BERT4Rec"),
        "causal_lm": ("seqray.model_sections:CausalLMConfig", "seqray.models.causal_lm:CausalLM"),
        "basket": ("seqray.model_sections:BasketConfig", "seqray.models.basket:BasketTransformer"),
        "esasrec": ("seqray.model_sections:ESASRecConfig", "seqray.models.esasrec:ESASRec"),
        "hstu": ("seqray.model_sections:HSTUConfig", "seqray.models.hstu:HSTU"),
        "gru4rec": ("seqray.model_sections:GRU4RecConfig", "seqray.models.gru4rec:GRU4Rec"),
    },
    "loss": {
        "softmax": ("seqray.sections:SoftmaxConfig", "seqray.losses:Softmax"),
        "sampled_softmax": ("seqray.sections:SampledSoftmaxConfig", "seqray.losses:SampledSoftmax"),
        "bce": ("seqray.sections:BCEConfig", "seqray.losses:BCE"),
        "gbce": ("seqray.sections:GBCEConfig", "seqray.losses:GBCE"),
    },
}
DEFAULT = {"model": "sasrec", "loss": "softmax"}
MODULE_ATTRIBUTE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_built_in(kind: str, type_: str) -> bool:
    """Whether `type_` is a short name of ours, so that nothing of the user's is imported for it."""
    return type_ in BUILT_IN[kind]


def config_class(kind: str, type_: str) -> type[Component]:
    """The section class of component `type_`; ConfigError names the choices."""
    if is_built_in(kind, type_):
        found = _attribute(BUILT_IN[kind][type_][0])
    else:
        found = getattr(component_class(kind, type_), "Config", None)
    if not (isinstance(found, type) and issubclass(found, Component)):
        raise ConfigError(
            f"{kind}.type: {type_!r} has no nested class Config that derives from seqray.sections.Component"
        )
    return found


def component_class(kind: str, type_: str) -> type[Any]:
    """The class of component `type_`, whose constructor takes its own Config and run-time sizes."""
    if is_built_in(kind, type_):
        built_in: type[Any] = _attribute(BUILT_IN[kind][type_][1])
        return built_in
    if not MODULE_ATTRIBUTE.fullmatch(type_):
        choices = ", ".join(BUILT_IN[kind])
        raise ConfigError(f"{kind}.type: {type_!r} is neither one of {choices} nor module:attribute")
    try:
        found = _attribute(type_)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{kind}.type: cannot load {type_!r}: {error}") from error
    if not isinstance(found, type):
        raise ConfigError(f"{kind}.type: {type_!r} is not a class")
    return found


def _attribute(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
