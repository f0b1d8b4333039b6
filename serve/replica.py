"""One replica: verifies the bundle itself, loads it, warms up, and only then has an application to answer with."""

import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.recommender import Recommender
from seqray.serve_config import ServeConfig
from serve.application import build_application
from serve.served_model import ServedModel
from serve.service import Service


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
        """settings: `serve` of the config as plain data."""
        serve = ServeConfig.model_validate(settings)
        threads = math.ceil(serve.cpus_per_replica)
        recommender = Recommender(Bundle.load(bundle, trusted, cache), serve.device, threads)
        champion = ServedModel(recommender, name, "champion", serve.max_batch_size)
        self.service = Service(name, champion, serve.deadline_ms)
        self.service.warm_up()
        self._shows_playground = serve.shows_playground

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return build_application(self.service, self._shows_playground)
