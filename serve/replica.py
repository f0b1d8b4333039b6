"""One replica: verifies the bundle itself, loads it, warms up, and only then has an application to answer with."""

from fastapi import FastAPI

from seqray.bundle import Bundle
from seqray.cache import Cache
from seqray.recommender import Recommender
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
        device: str,
        num_threads: int,
        max_batch_size: int,
        cache: Cache | None = None,
        playground: bool = False,
    ) -> None:
        recommender = Recommender(Bundle.load(bundle, trusted, cache), device, num_threads)
        self.service = Service(name, ServedModel(recommender, name, "champion", max_batch_size))
        self.service.warm_up()
        self._playground = playground

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return build_application(self.service, self._playground)
