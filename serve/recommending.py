"""POST /v1/recommend, /v1/recommend:batch, /v1/similar-items, /v1/rank and /v1/explain."""

import asyncio
from time import perf_counter
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from seqray.recommender import Query, Recommendation, SimilarQuery
from serve.answers import recommendation
from serve.bodies import Path, answer, answer_headers, parse, parse_json, read_body, read_json
from serve.client import Client
from serve.problems import Problem
from serve.record import current
from serve.requests import (
    BatchRequest,
    ExplainRequest,
    RankRequest,
    Read,
    RecommendRequest,
    SimilarItemsRequest,
    read_context,
)
from serve.served_model import ServedModel
from serve.service import Models, Service
from serve.usual import read_usual


async def recommend(service: Service, request: Request) -> Response:
    """One context in, ranked items out."""
    body = await read_body(request)
    usual = read_usual(body, as_json=service.shadow is None)  # the shadow compares items
    return await _one_context(service, request, usual or read_context(RecommendRequest, parse_json(body)))


async def rank(service: Service, request: Request) -> Response:
    """Given candidates, ordered for a context."""
    return await _one_context(service, request, read_context(RankRequest, await read_json(request)))


async def explain(service: Service, request: Request) -> Response:
    """Which events of the history drove each item."""
    return await _one_context(service, request, read_context(ExplainRequest, await read_json(request)))


async def batch(service: Service, request: Request) -> Response:
    """Several contexts, a result or a problem for each."""
    began = current().started
    asked = parse(BatchRequest, await read_json(request)).requests
    models = service.models  # for all of them, so that a new model does not come in between
    client = Client(request.receive)
    entries = (_entry(service, models, client, data, ("requests", place), began) for place, data in enumerate(asked))
    return answer({"results": await asyncio.gather(*entries)}, answer_headers())


async def similar_items(service: Service, request: Request) -> Response:
    """One item in, its like out."""
    began = current().started
    asked = parse(SimilarItemsRequest, await read_json(request))
    model = service.champion
    client = Client(request.receive)
    found = await _in_time(service, model, client, asked.asked(model.recommender), asked.deadline_ms, began)
    body = recommendation(model, found, asked.include, _no_item(found, asked.filter))
    return answer(body, answer_headers(model.version))


async def _one_context(service: Service, request: Request, read: Read) -> Response:
    began = current().started
    model = service.models.for_user(read.context.who)
    body = await _context_body(service, model, Client(request.receive), read, began)
    return answer(body, answer_headers(model.version))


async def _entry(
    service: Service, models: Models, client: Client, data: Any, path: Path, began: float
) -> dict[str, Any]:
    try:
        read = read_context(RecommendRequest, data, path)
        model = models.for_user(read.context.who)
        return {"result": await _context_body(service, model, client, read, began, path)}
    except Problem as problem:
        return {"problem": problem.as_json()}


async def _context_body(
    service: Service, model: ServedModel, client: Client, read: Read, began: float, path: Path = ()
) -> dict[str, Any]:
    context = read.context
    query = context.asked(model.recommender, path)
    found = await _in_time(service, model, client, query, context.deadline_ms, began)
    warnings = read.warnings + _no_item(found, getattr(context, "filter", None))
    body = recommendation(model, found, context.include, warnings, read.dropped)
    if context.is_recommendation:
        service.compare(model, context.asked, found, body["recommendation_id"])
    return body


async def _in_time(
    service: Service,
    model: ServedModel,
    client: Client,
    query: Query | SimilarQuery,
    deadline_ms: int | None,
    began: float,
) -> Recommendation:
    """The answer; Problem 504 when the deadline, counted from `began`, passes first. Work not begun is dropped."""
    allowed_ms = deadline_ms or service.deadline_ms
    try:
        return await model.recommend(query, client, began + allowed_ms / 1000 - perf_counter())
    except TimeoutError as error:
        raise Problem(504, f"The deadline of {allowed_ms} ms has passed.") from error


def _no_item(found: Recommendation, chosen: Any) -> list[str]:
    return [] if found.items or chosen is None else ["filter: no item that may be returned meets it"]
