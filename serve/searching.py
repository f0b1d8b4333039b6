"""GET /v1/items: items by their id and what their texts say."""

import asyncio
from typing import Annotated, Any

import pyarrow as pa
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response

from serve.answers import ModelName
from serve.bodies import answer, answer_headers, invalid, parse, plain
from serve.fields import Strict
from serve.problems import FieldError, pointer
from serve.service import Service

MAX_LIMIT = 100


class ItemsQuery(Strict):
    """The parameters of GET /v1/items."""

    query: Annotated[str, Field(max_length=256)] = ""
    """Words that an item's id or texts hold, case and accents aside; none: the most popular items."""
    limit: int = Field(20, ge=1, le=MAX_LIMIT)
    """Items wanted."""


class FoundItem(BaseModel):
    """One item found."""

    item_id: str | int
    metadata: dict[str, Any]


class ItemsResponse(BaseModel):
    """The answer, best match first."""

    model: ModelName
    items: list[FoundItem]
    total: int = Field(ge=0)
    """Items that match, returned or not."""


async def items(service: Service, request: Request) -> Response:
    """Items that hold every word of the query, the best matches and among them the most popular ones first."""
    asked = _parameters(request)
    model = service.champion
    rows, total = await asyncio.to_thread(model.search.rows, asked.query, asked.limit)
    bundle = model.recommender.bundle
    ids = bundle.items.column("item_id").take(pa.array(rows, pa.int64())).to_pylist()
    metadata = model.recommender.metadata(ids)
    found = [
        {"item_id": plain(item_id), "metadata": plain(about)} for item_id, about in zip(ids, metadata, strict=True)
    ]
    return answer({"model": model.about, "items": found, "total": total}, answer_headers(model.version))


def _parameters(request: Request) -> ItemsQuery:
    given = request.query_params.multi_items()
    twice = [FieldError(pointer([name]), "given twice") for name in {name for name, _ in given}
             if len(request.query_params.getlist(name)) > 1]  # fmt: skip
    if twice:
        raise invalid(twice)
    values = dict(given)
    limit = values.get("limit", "")
    number = limit.isascii() and limit.isdecimal() and len(limit) < 9
    return parse(ItemsQuery, {**values, "limit": int(limit)} if number else values)
