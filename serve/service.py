"""Service: what the endpoints of a replica share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from seqray.recommender import Query, Recommendation, Recommender
from serve.canary import is_in_share
from serve.event_buffer import EventBuffer
from serve.measures import FAILED, MODEL, SHADOW, SHADOW_OVERLAP, WAITING, Labels, Measures
from serve.problems import Problem
from serve.served_model import ServedModel
from serve.shadow import Shadow


@dataclass(frozen=True)
class Models:
    """The models that answer at a moment. They are exchanged together, as one object."""

    champion: ServedModel
    challenger: ServedModel | None = None
    canary_share: float = 0.0
    """Of the users, those that the challenger answers."""

    def both(self) -> tuple[ServedModel, ...]:
        """The champion, and the challenger where there is one."""
        return (self.champion,) if self.challenger is None else (self.champion, self.challenger)

    def for_user(self, user: str | None) -> ServedModel:
        """The model that answers a user (user or session id); who is nobody gets the champion."""
        if self.challenger is None or user is None:
            return self.champion
        salt = f"{self.challenger.about['name']}/{self.challenger.version}"  # another challenger meets other users
        return self.challenger if is_in_share(user, salt, self.canary_share) else self.champion


@dataclass(frozen=True)
class RegistryState:
    """What a replica knows of its registry."""

    change: int
    """Number of the change that it follows."""
    champion: int | None
    """The version that the registry wants; an older one answers where it failed."""
    challenger: int | None = None
    failed: dict[int, str] = field(default_factory=dict)
    """Versions that it wants and that did not become ready, with the reason."""
    trouble: str | None = None
    """Why the registry cannot be read at the moment."""


class Service:
    """The models that answer, and whether they may be asked."""

    def __init__(self, name: str, champion: ServedModel, deadline_ms: int = 2000, shadow: Shadow | None = None) -> None:
        """deadline_ms: of a request that names none."""
        self.name = name
        self.deadline_ms = deadline_ms
        self.measures = Measures()
        self.measures.watch(MODEL, self._answering)
        self.measures.watch(WAITING, self._waiting)
        self.measures.watch(FAILED, self._failed)
        if shadow is not None:
            self.measures.watch(SHADOW, shadow.outcomes)
            self.measures.watch(SHADOW_OVERLAP, shadow.mean_overlap)
        self.ready = False
        self.registry: RegistryState | None = None
        self.events: EventBuffer | None = None
        """Where events go; None when they are not taken."""
        self.shadow = shadow
        self._models = Models(champion)

    def warm_up(self) -> None:
        """Warms the model up, then opens; or BundleError."""
        self._models.champion.warm_up()
        self.ready = True

    def put(self, models: Models) -> None:
        """Opens with these models, which are warm, or goes over to them; from any thread.

        A request that has its model already is answered by that one, whose weights are freed with its last answer.
        """
        self._models = models  # one assignment, so that nobody sees half of it
        self.ready = True

    @property
    def models(self) -> Models:
        """The models of this moment; a request takes them once, so that its answer is of one. Problem 503 before they
        are ready."""
        if not self.ready:
            raise Problem(503, "The model is not ready.", headers={"Retry-After": "1"})
        return self._models

    @property
    def champion(self) -> ServedModel:
        """The model that answers unless another is chosen; Problem 503 before it is ready."""
        return self.models.champion

    def compare(
        self, asked: ServedModel, ask: Callable[[Recommender], Query], found: Recommendation, recommendation_id: str
    ) -> None:
        """Has the challenger asked the same off the request's path, when it is to be shadowed and did not answer."""
        challenger = self._models.challenger
        if self.shadow is not None and challenger is not None and asked.about["variant"] == "champion":
            self.shadow.offer(challenger, asked.version, ask, found, recommendation_id)

    def _answering(self) -> Mapping[Labels, float]:
        models = self._models.both()
        return {(model.about["name"], model.version, model.about["variant"]): 1 for model in models}

    def _waiting(self) -> Mapping[Labels, float]:
        return {(model.about["variant"],): model.num_waiting for model in self._models.both()}

    def _failed(self) -> Mapping[Labels, float]:
        return {} if self.registry is None else {(): len(self.registry.failed)}
