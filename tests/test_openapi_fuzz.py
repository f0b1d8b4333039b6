"""Requests that schemathesis makes up from the OpenAPI document, right ones and wrong ones: each gets what it says."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from raw_http import serving
from schemathesis.checks import negative_data_rejection, not_a_server_error, positive_data_acceptance

from seqray.bundle import Bundle
from seqray.recommender import Recommender
from seqray.serve_config import ServeConfig
from serve.application import build_application
from serve.event_buffer import open_buffer
from serve.middleware import ProblemMiddleware
from serve.openapi import openapi_document
from serve.served_model import ServedModel
from serve.service import Service

FUZZ = {"derandomize": True, "database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}


schema = schemathesis.openapi.from_dict(openapi_document("tiny"))


@pytest.fixture(scope="module")
def url(tiny_bundle: Bundle, module_port: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    service = Service("tiny", ServedModel(Recommender(tiny_bundle), "tiny", "champion", 4))
    service.warm_up()
    settings = ServeConfig(events={"folder": str(tmp_path_factory.mktemp("events"))})
    service.events = open_buffer(settings.events, settings.retry_after_s)
    with serving(ProblemMiddleware(build_application(service, settings=settings)), module_port):
        yield f"http://127.0.0.1:{module_port}"


@schema.parametrize()
@settings(max_examples=15, **FUZZ)
def test_every_answer_is_one_that_the_document_knows(case: Any, url: str) -> None:
    check(case, url)


@pytest.mark.slow
@schema.parametrize()
@settings(max_examples=300, **FUZZ)
def test_every_answer_is_one_that_the_document_knows_at_length(case: Any, url: str) -> None:
    check(case, url)


UNSAID = ("k is for recommended items", "user_id or session_id is needed", "not within ")
"""How refusals begin whose reason the document cannot say: fields that must or may not be null together, and times
from now. Nor can it say which fields there are to filter by."""


def whole(value: Any) -> Any:
    """The JSON value with 3.0 as 3: to a schema they are the same, to us the first is no whole number."""
    if isinstance(value, dict):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [whole(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def check(case: Any, url: str) -> None:
    """All checks of schemathesis, but where the document cannot say what is right."""
    case.body = whole(case.body)
    response = case.call(base_url=url)
    body = response.json()
    excluded = []
    if response.status_code == 504:
        assert case.body["deadline_ms"] < 1000
        excluded.append(not_a_server_error)
    errors = body.get("errors", [])
    if errors and all(_is_unsaid(**error) for error in errors):
        excluded.append(positive_data_acceptance)
    if "results" in body:
        excluded.append(negative_data_rejection)  # a wrong request in a batch has its own problem
    case.validate_response(response, excluded_checks=excluded)


def _is_unsaid(pointer: str, detail: str) -> bool:
    return pointer.startswith("/filter") or detail.startswith(UNSAID)
