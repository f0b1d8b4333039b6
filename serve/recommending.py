"""POST /v1/recommend."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from seqray.recommender import Recommendation
from serve.bodies import answer, answer_headers, plain, read_json
from serve.schemas import parse_recommend
from serve.served_model import ServedModel
from serve.service import Service

CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


async def recommend(service: Service, request: Request) -> Response:
    """One context in, ranked items out."""
    asked, warnings = parse_recommend(await read_json(request))
    model = service.model_for(asked.user_id or asked.session_id)
    found = await model.recommend(asked.query())
    body = recommendation_body(model, found, asked.include, warnings)
    return answer(body, answer_headers(request, model.version))


def recommendation_body(
    model: ServedModel, found: Recommendation, include: Sequence[str], warnings: Sequence[str]
) -> dict[str, Any]:
    """The answer of recommend."""
    metadata = None
    if "metadata" in include:
        metadata = model.recommender.metadata(item.item_id for item in found.items)
    return {
        "recommendation_id": new_recommendation_id(),
        "model": model.about,
        "items": _items(found, "score" in include, metadata),
        "unknown_items": found.unknown_items,
        "fallback_used": found.fallback_used,
        "warnings": warnings,
    }


def new_recommendation_id() -> str:
    """rec_ and a ULID: 48 bits of milliseconds and 80 random ones, so that ids sort by time."""
    number = (time.time_ns() // 1_000_000 << 80) | int.from_bytes(os.urandom(10))
    return "rec_" + "".join(CROCKFORD[number >> shift & 31] for shift in range(125, -1, -5))


def _items(found: Recommendation, score: bool, metadata: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    items = []
    for rank, item in enumerate(found.items, start=1):
        shown: dict[str, Any] = {"item_id": _plain_id(item.item_id), "rank": rank}
        if score:
            shown["score"] = item.score
        shown["source"] = item.source
        if metadata is not None:
            shown["metadata"] = plain(metadata[rank - 1])
        items.append(shown)
    return items


def _plain_id(item_id: Any) -> str | int:
    return item_id if isinstance(item_id, str | int) else str(item_id)
