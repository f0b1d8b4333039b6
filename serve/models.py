"""GET /v1/models: which models answer, where they come from and how good they are."""

from dataclasses import asdict
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from serve.bodies import answer, answer_headers
from serve.served_model import ServedModel, Variant
from serve.service import RegistryState, Service

Aliases = dict[Variant, str | None]


class Told(BaseModel):
    """A part of the answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class ModelResponse(Told):
    """A model that answers."""

    name: str
    version: str
    """Its number in the registry, or without one the run that made it."""
    variant: Variant
    state: Literal["ready"] = "ready"
    run_id: str
    """The run that made it."""
    created: str | None
    type: str
    items: int = Field(ge=1)
    metrics: dict[str, float]
    """Those of its bundle, such as test/ndcg@10."""


class FailedVersion(Told):
    """A version that the registry wants and that did not become ready."""

    version: str
    reason: str


class RegistryResponse(Told):
    """What the replica knows of its registry."""

    change: int
    """Number of the last change that it followed."""
    aliases: Aliases
    """The versions that the registry wants."""
    failed: list[FailedVersion]
    readable: bool
    """Whether the registry could be read at the last look."""


class ModelsResponse(Told):
    """The models of the replica that answered."""

    models: list[ModelResponse]
    aliases: Aliases
    """The versions that answer."""
    canary_share: float
    """Share of the users whom the challenger answers."""
    registry: RegistryResponse | None = None
    shadow: dict[str, float] | None = None
    """Comparisons since the replica started: compared, dropped, failed, mean overlap and score_difference."""


async def models(service: Service, _request: Request) -> Response:
    """The models of this replica, the aliases that the registry wants, and what failed."""
    answering = service.models
    found = [answering.champion, *([answering.challenger] if answering.challenger is not None else [])]
    body = ModelsResponse(
        models=[_model(model) for model in found],
        aliases=_aliases(*(model.version for model in found)),
        canary_share=answering.canary_share,
        registry=None if service.registry is None else _registry(service.registry),
        shadow=None if service.shadow is None else asdict(service.shadow.counts),
    )
    return answer(body.model_dump(mode="json"), answer_headers(answering.champion.version))


def _model(model: ServedModel) -> ModelResponse:
    bundle = model.recommender.bundle
    metrics: dict[str, Any] = {key: value for key, value in bundle.metrics.items() if type(value) in (int, float)}
    return ModelResponse(
        **model.about, run_id=bundle.version, created=bundle.manifest.get("created"), type=bundle.config.model.type,
        items=bundle.num_items, metrics=metrics,
    )  # fmt: skip


def _registry(state: RegistryState) -> RegistryResponse:
    failed = [FailedVersion(version=str(version), reason=reason) for version, reason in sorted(state.failed.items())]
    aliases = _aliases(*(None if version is None else str(version) for version in (state.champion, state.challenger)))
    return RegistryResponse(change=state.change, aliases=aliases, failed=failed, readable=state.trouble is None)


def _aliases(champion: str | None, challenger: str | None = None) -> Aliases:
    return {"champion": champion, "challenger": challenger}
