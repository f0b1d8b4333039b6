"""GET /metrics."""

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import Response

from serve.bodies import answer_headers
from serve.service import Service


async def metrics(service: Service, _request: Request) -> Response:
    """The measures of the replica that answers, as Prometheus reads them."""
    return Response(service.measures.text(), headers=answer_headers(), media_type=CONTENT_TYPE_PLAIN_0_0_4)
