"""Service: what the endpoints of a replica share."""

from serve.problems import Problem
from serve.served_model import ServedModel


class Service:
    """The model that answers, and whether it may be asked."""

    def __init__(self, name: str, champion: ServedModel, deadline_ms: int = 2000) -> None:
        """deadline_ms: of a request that names none."""
        self.name = name
        self.deadline_ms = deadline_ms
        self.ready = False
        self._champion = champion

    def warm_up(self) -> None:
        """Warms the model up, then opens; or BundleError."""
        self._champion.warm_up()
        self.ready = True

    @property
    def champion(self) -> ServedModel:
        """The model that answers unless another is chosen; Problem 503 before it is ready."""
        if not self.ready:
            raise Problem(503, "The model is not ready.", headers={"Retry-After": "1"})
        return self._champion

    def model_for(self, user: str | None) -> ServedModel:
        """The model that answers a user (user or session id); a request asks once, so that one model answers it all."""
        del user
        return self.champion
