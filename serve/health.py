"""GET /healthz/live and /healthz/ready."""

from starlette.requests import Request
from starlette.responses import Response

from serve.bodies import answer, answer_headers
from serve.service import Service


async def live(_service: Service, request: Request) -> Response:
    """200 as long as the process answers; never depends on the model."""
    return answer({"status": "live"}, answer_headers(request))


async def ready(service: Service, request: Request) -> Response:
    """200 when the model was verified and has ranked a request."""
    model = service.champion
    return answer({"status": "ready", "model": model.about}, answer_headers(request, model.version))
