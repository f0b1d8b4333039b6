"""One replica: verifies the bundle itself, loads it, warms up, and only then has an application to answer with."""

import gc
import math
import sys
from collections.abc import Mapping
from typing import Any

from seqray.cache import Cache
from seqray.serve_config import ServeConfig
from serve.admission import Admission
from serve.application import build_application
from serve.asgi import Application
from serve.event_buffer import open_buffer
from serve.follower import Follower, ModelLoader
from serve.journal import log_to_stdout
from serve.ray_measures import show_in_ray
from serve.registry import Registry
from serve.service import Models, Service
from serve.shadow import Shadow

SWITCH_S = 0.0005
"""After which the event loop lets the model's thread have the interpreter's lock: with Python's 5 ms the next batch
would wait as long as it takes."""


class Replica:
    """The ingress deployment, with the model inside: a second hop would cost several times the work."""

    def __init__(
        self,
        bundle: str,
        trusted: tuple[str, ...],
        name: str,
        settings: Mapping[str, Any],
        cache: Cache | None = None,
    ) -> None:
        """bundle: path or URI of the one to serve; not looked at where there is a registry.

        settings: `serve` of the config as plain data.
        """
        spare_collections()
        sys.setswitchinterval(SWITCH_S)
        serve = ServeConfig.model_validate(settings)
        admission = Admission(trusted, serve.max_bundle_mb, serve.max_items, cache)
        threads = math.ceil(serve.cpus_per_replica)
        indexes = (cache or Cache()).index_folder
        loader = ModelLoader(name, serve.device, threads, serve.max_batch_size, admission, serve.retrieval, indexes)
        follower = None
        if serve.registry is None:
            models = Models(loader.load(bundle))
        else:
            follower = Follower(Registry.at(serve.registry), loader, serve.registry_poll_s, serve.canary_share)
            models = follower.first_models()
        self.service = Service(name, models.champion, serve.deadline_ms, Shadow() if serve.shadow else None)
        self.service.events = open_buffer(serve.events, serve.retry_after_s)
        self.service.put(models)
        if follower is not None:
            follower.start(self.service)
        self._settings = serve

    def __serve_build_asgi_app__(self) -> Application:
        """Called by Ray Serve after the constructor."""
        show_in_ray(self.service.measures)
        log_to_stdout()
        return build_application(self.service, self._settings.shows_playground, self._settings)


def spare_collections() -> None:
    """Leaves what the imports made out of all later garbage collections, and has fewer of them.

    PyTorch, Ray and pydantic are a million objects; to walk through them took 300 ms of a request of many small lists.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
