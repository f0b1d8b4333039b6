"""/openapi.json: the requests, answers and problems of the API."""

from typing import Any

from pydantic import BaseModel

from seqray import __version__
from serve.problems import MEDIA_TYPE
from serve.schemas import RecommendRequest, RecommendResponse
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
_REFUSALS = {
    "400": "A field is invalid or unknown; `errors` names each.",
    "413": "The body is larger than 1 MiB.",
    "415": "The body is not JSON.",
    "503": "Too many requests, or not ready; see Retry-After.",
}


def openapi_document(name: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of the application `name`."""
    schemas: dict[str, Any] = {"Problem": _PROBLEM}
    for model in (RecommendRequest, RecommendResponse, ItemsResponse):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
    problem = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    refusals = {status: {"description": text, "content": problem} for status, text in _REFUSALS.items()}
    recommend = {
        "summary": "One context in, ranked items out",
        "operationId": "recommend",
        "requestBody": {"required": True, "content": _json("RecommendRequest")},
        "responses": {"200": {"description": "The items.", "content": _json("RecommendResponse")}, **refusals},
    }
    items = {
        "summary": "Items by their id and what their texts say",
        "operationId": "items",
        "parameters": _query_parameters(ItemsQuery),
        "responses": {"200": {"description": "The items.", "content": _json("ItemsResponse")}, **refusals},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": f"{name}: recommendations", "version": __version__},
        "paths": {
            "/v1/recommend": {"post": recommend},
            "/v1/items": {"get": items},
            "/healthz/live": {"get": _health("live", "The process answers.")},
            "/healthz/ready": {"get": _health("ready", "The model was verified and has ranked a request.")},
        },
        "components": {"schemas": schemas},
    }


def _json(name: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}


def _query_parameters(model: type[BaseModel]) -> list[dict[str, Any]]:
    fields = model.model_json_schema()["properties"]
    return [{"name": name, "in": "query", "schema": schema} for name, schema in fields.items()]


def _health(name: str, text: str) -> dict[str, Any]:
    return {"summary": text, "operationId": name, "responses": {"200": {"description": text}}}
