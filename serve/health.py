"""GET /healthz/live and /healthz/ready."""

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from serve.bodies import answer, answer_headers
from serve.service import Service


async def live(_service: Service, _request: Request) -> Response:
    """200 as long as the process answers; never depends on the model."""
    return answer({"status": "live"}, answer_headers())


async def ready(service: Service, _request: Request) -> Response:
    """200 when the model was verified and has ranked a request."""
    model = service.champion
    body: dict[str, Any] = {"status": "ready", "model": model.about}
    if service.registry is not None:
        challenger = service.models.challenger
        body["challenger"] = challenger.about if challenger is not None else None
        body["failed"] = sorted(map(str, service.registry.failed))
    return answer(body, answer_headers(model.version))
