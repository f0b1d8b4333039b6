"""/openapi.json: the requests, answers and problems of the API."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from seqray import __version__
from seqray.item_filter import OPERATIONS
from serve.access import access
from serve.answers import BatchResponse, RecommendResponse
from serve.events import EventsRequest, EventsResponse
from serve.models import ModelsResponse
from serve.problems import MEDIA_TYPE
from serve.requests import BatchRequest, ExplainRequest, RankRequest, RecommendRequest, SimilarItemsRequest
from serve.searching import ItemsQuery, ItemsResponse

_PROBLEM = {
    "type": "object",
    "description": "RFC 9457 problem details.",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string", "examples": ["INVALID_ARGUMENT"]},
        "detail": {"type": "string"},
        "request_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"pointer": {"type": "string", "examples": ["/k"]}, "detail": {"type": "string"}},
            },
        },
    },
}
_FILTERS = {"type": "array", "minItems": 1, "items": {"$ref": "#/components/schemas/Filter"}}
_FILTER = {
    "description": "A condition on a column of the item table, or filters of which all, any or not must hold.",
    "examples": [{"all": [{"field": "category", "in": ["shoes"]}, {"field": "price", "lte": 80}]}],
    "anyOf": [
        {"type": "null"},
        {"type": "object", "required": ["all"], "properties": {"all": _FILTERS}, "additionalProperties": False},
        {"type": "object", "required": ["any"], "properties": {"any": _FILTERS}, "additionalProperties": False},
        {
            "type": "object",
            "required": ["not"],
            "properties": {"not": {"$ref": "#/components/schemas/Filter"}},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["field"],
            "minProperties": 2,
            "properties": {
                "field": {"type": "string"},
                **{name: {} for name in OPERATIONS},
                "in": {"type": "array"},
                "exists": {"type": "boolean"},
            },
            "additionalProperties": False,
        },
    ],
}
_FILTERED = (("RecommendRequest", "filter"), ("SimilarItemsRequest", "filter"))
_REFUSALS = {
    "400": "A field is invalid or unknown; `errors` names each.",
    "408": "The body did not arrive in time.",
    "413": "The body is larger than 1 MiB.",
    "415": "The body is not JSON.",
    "431": "Too many headers.",
    "503": "Too many requests, or not ready; see Retry-After.",
    "504": "The deadline has passed.",
}
_KEY_REFUSALS = {
    "401": "No key, or one that is unknown, revoked or expired.",
    "403": "The key does not have the scope.",
    "429": "The key asks too often; see Retry-After.",
}
_OPERATIONS: tuple[tuple[str, str, type[BaseModel], type[BaseModel]], ...] = (
    ("/v1/recommend", "One context in, ranked items out", RecommendRequest, RecommendResponse),
    ("/v1/recommend:batch", "Several contexts, a result or a problem for each", BatchRequest, BatchResponse),
    ("/v1/similar-items", "One item in, its like out", SimilarItemsRequest, RecommendResponse),
    ("/v1/rank", "Given candidates, ordered for a context", RankRequest, RecommendResponse),
    ("/v1/explain", "Which events of the history drove each item", ExplainRequest, RecommendResponse),
)


def openapi_document(name: str, asks_keys: bool = False) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the application `name`; with `asks_keys` it says where a key is to be shown."""
    schemas: dict[str, Any] = {"Problem": _PROBLEM, "Filter": _FILTER}
    models: list[type[BaseModel]] = [EventsRequest, EventsResponse, ItemsResponse, ModelsResponse]
    for _, _, request, response in _OPERATIONS:
        models += [request, response]
    for model in models:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    for model_name, field in _FILTERED:
        schemas[model_name]["properties"][field] |= {"$ref": "#/components/schemas/Filter"}
    schemas["BatchRequest"]["properties"]["requests"]["items"] = {"$ref": "#/components/schemas/RecommendRequest"}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": f"{name}: recommendations", "version": __version__},
        "paths": {
            **{path: {"post": _post(path, *about)} for path, *about in _OPERATIONS},  # type: ignore[arg-type]
            "/v1/events": {"post": _post_events()},
            "/v1/items": {"get": _get_items()},
            "/v1/models": {"get": _get_models()},
            "/healthz/live": {"get": _health("live", "The process answers.")},
            "/healthz/ready": {"get": _health("ready", "The model was verified and has ranked a request.")},
        },
        "components": {"schemas": schemas},
    }
    if asks_keys:
        _ask_for_keys(document)
    return document


def _ask_for_keys(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        if access(path).scope is not None:
            for operation in operations.values():
                operation["security"] = [{"key": []}]
                operation["responses"] |= _problems(_KEY_REFUSALS)


def _get_models() -> dict[str, Any]:
    return {
        "summary": "Which models answer, their metrics, and what the registry wants",
        "operationId": "models",
        "responses": {"200": {"description": "The models.", "content": _json("ModelsResponse")}},
    }


def _get_items() -> dict[str, Any]:
    return {
        "summary": "Items by their id and what their texts say",
        "operationId": "items",
        "parameters": _query_parameters(ItemsQuery),
        "responses": {"200": {"description": "The items.", "content": _json("ItemsResponse")}, **_refusals()},
    }


def _post_events() -> dict[str, Any]:
    refusals = {status: refusal for status, refusal in _refusals().items() if status != "504"}
    refusals["404"] = {**refusals["400"], "description": "This server takes no events."}
    return {
        "summary": "Events in, durable when answered",
        "operationId": "events",
        "requestBody": {"required": True, "content": _json("EventsRequest")},
        "responses": {"202": {"description": "All events are kept.", "content": _json("EventsResponse")}, **refusals},
    }


def _post(path: str, summary: str, request: type[BaseModel], response: type[BaseModel]) -> dict[str, Any]:
    return {
        "summary": summary,
        "operationId": path.removeprefix("/v1/").replace(":", "_").replace("-", "_"),
        "requestBody": {"required": True, "content": _json(request.__name__)},
        "responses": {"200": {"description": "The answer.", "content": _json(response.__name__)}, **_refusals()},
    }


def _refusals() -> dict[str, Any]:
    return _problems(_REFUSALS)


def _problems(texts: Mapping[str, str]) -> dict[str, Any]:
    problem = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": text, "content": problem} for status, text in texts.items()}


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    fields = model.model_json_schema()["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]


def _health(name: str, text: str) -> dict[str, Any]:
    return {"summary": text, "operationId": name, "responses": {"200": {"description": text}}}
