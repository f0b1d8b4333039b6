"""Follower: a replica goes after the aliases of its registry without a new process.

A thread looks for the next change, loads what it wants beside the weights that answer, verifies and warms it up, and
only then puts it in their place. Whatever fails there leaves the old models answering.
"""

import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

from seqray.bundle import Bundle
from seqray.errors import BundleError, DataError, SeqrayError
from seqray.recommender import Recommender
from seqray.serve_config import RetrievalConfig
from serve.admission import Admission
from serve.journal import MODELS_LOGGER, event_line
from serve.registry import Registry
from serve.served_model import ServedModel, Variant
from serve.service import Models, RegistryState, Service

FIRST_RETRY_S, LAST_RETRY_S = 2.0, 600.0
"""Waits before a version is tried again that could not be fetched or found no memory, doubled each time."""


@dataclass(frozen=True)
class ModelLoader:
    """How a bundle becomes a model that may answer; plain data, so that it travels to the replicas."""

    name: str
    device: str
    num_threads: int
    max_batch_size: int
    admission: Admission
    retrieval: RetrievalConfig | None = None
    index_folder: Path | None = None

    def load(self, location: str) -> ServedModel:
        """The model of a bundle, warm, or BundleError."""
        return self._warm(self.admission.load(location), "champion", None)

    def load_version(self, registry: Registry, number: int, variant: Variant) -> ServedModel:
        """The model of a version, warm; BundleError or DataError."""
        version = registry.version(number)
        bundle = self.admission.load(registry.bundle(version), version.manifest_sha256)
        return self._warm(bundle, variant, str(number))

    def _warm(self, bundle: Bundle, variant: Variant, version: str | None) -> ServedModel:
        recommender = Recommender(
            bundle, self.device, self.num_threads, build_kernels=True, retrieval=self.retrieval,
            index_folder=self.index_folder,
        )  # fmt: skip
        model = ServedModel(recommender, self.name, variant, self.max_batch_size, version)
        model.warm_up()
        return model


class Follower:
    """Keeps the models of a service those that its registry wants."""

    def __init__(self, registry: Registry, loader: ModelLoader, poll_s: float, canary_share: float = 0.0) -> None:
        self._registry, self._loader, self._poll_s = registry, loader, poll_s
        self._canary_share = canary_share
        self._change = registry.head()
        self._failed: dict[int, str] = {}
        self._refused: set[int] = set()  # those of them that will not get better
        self._retry_s, self._retry_at = FIRST_RETRY_S, float("inf")
        self._ended = threading.Event()

    def first_models(self) -> Models:
        """The champion, or where it is broken the last one that is not, and the challenger; BundleError without any."""
        if not self._change.champions:
            raise BundleError(f"{self._registry.folder}: no champion; python -m serve promote CONFIG BUNDLE")
        for number in dict.fromkeys(self._change.champions):
            champion = self._try(number, "champion")
            if champion is not None:
                wanted = self._change.challenger
                challenger = None if wanted is None else self._found(Models(champion), wanted, "challenger")
                return Models(champion, challenger, self._canary_share)
        reasons = "; ".join(f"version {number}: {reason}" for number, reason in self._failed.items())
        raise BundleError(f"{self._registry.folder}: no champion that can answer: {reasons}")

    def start(self, service: Service) -> None:
        """Goes after the registry from now on, in a thread that ends with the process."""
        service.registry = self._state()
        threading.Thread(target=self._follow, args=(service,), name="follower", daemon=True).start()

    def close(self) -> None:
        """Ends the thread at its next look."""
        self._ended.set()

    def look(self, service: Service) -> None:
        """Follows the registry to its last change; tries again what failed for a reason that may pass."""
        try:
            change = self._registry.latest(self._change)
        except (DataError, OSError) as error:
            if service.registry is not None and service.registry.trouble is None:
                MODELS_LOGGER.warning(event_line("registry cannot be read", {"error": str(error)}))
            service.registry = replace(self._state(), trouble=str(error))
            return
        if change != self._change:
            self._failed, self._refused, self._retry_s = {}, set(), FIRST_RETRY_S
        elif time.monotonic() < self._retry_at:
            if service.registry is None or service.registry.trouble is not None:
                service.registry = self._state()
            return
        self._change, self._retry_at = change, float("inf")
        self._go_over(service)

    def _follow(self, service: Service) -> None:
        while not self._ended.wait(self._poll_s):
            self.look(service)

    def _go_over(self, service: Service) -> None:
        change, before = self._change, service.models
        champion = before.champion
        if change.champion is not None:
            champion = self._found(before, change.champion, "champion") or champion
        challenger = before.challenger
        if challenger is not None and challenger.version != str(change.challenger):
            challenger = None
        service.put(Models(champion, challenger, self._canary_share))  # before a challenger, which nobody waits for
        if change.challenger is not None and challenger is None:
            challenger = self._found(before, change.challenger, "challenger")
            service.put(Models(champion, challenger, self._canary_share))
        service.registry = self._state()
        names = {"champion": champion.version, "challenger": challenger.version if challenger is not None else None}
        MODELS_LOGGER.info(event_line("models", {"change": change.number, **names}))

    def _found(self, now: Models, number: int, variant: Variant) -> ServedModel | None:
        """A version: the one that answers already, perhaps under the other alias, or it is loaded; None: it failed."""
        for model in (now.champion, now.challenger):
            if model is not None and model.version == str(number):
                return model if model.about["variant"] == variant else model.as_variant(variant)
        return None if number in self._refused else self._try(number, variant)

    def _try(self, number: int, variant: Variant) -> ServedModel | None:
        try:
            model = self._loader.load_version(self._registry, number, variant)
        except Exception as error:  # noqa: BLE001 - a model may be of foreign code; whatever it does, the old one answers
            self._failed[number] = _reason(error)
            told = {"version": str(number), "variant": variant, "error": f"{type(error).__name__}: {error}"}
            MODELS_LOGGER.error(event_line("version failed", told))
            if isinstance(error, BundleError):
                self._refused.add(number)
            else:  # storage, or memory, may be better later
                self._retry_at = time.monotonic() + self._retry_s
                self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)
            return None
        self._failed.pop(number, None)
        return model

    def _state(self) -> RegistryState:
        change = self._change
        return RegistryState(change.number, change.champion, change.challenger, dict(self._failed))


def _reason(error: Exception) -> str:
    """For users of the API: what is wrong, without the path in front; the log has all of it."""
    return str(error).partition(": ")[2] or str(error) if isinstance(error, SeqrayError) else type(error).__name__
