"""Asking a running endpoint which version answers, until the one that was promoted does."""

import http.client
import json
import os
import time
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit

from seqray.errors import ConfigError

ANSWERS_IN_A_ROW = 10
"""Of one version, on connections of their own: they come from several replicas where there are several."""
LOOK_S = 0.1

Variant = Literal["champion", "challenger"]


@dataclass(frozen=True)
class Waited:
    """How a wait ended."""

    state: Literal["serves", "refused", "silent", "late"]
    """serves: every answer is of the version. refused: a replica says that it failed. silent: nobody answers there."""
    seconds: float
    reason: str = ""


def check_url(url: str) -> None:
    """ConfigError when this is not the http or https address of an endpoint."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--wait {url!r}: not an address such as http://127.0.0.1:8000")


def wait_for(url: str, version: int | None, variant: Variant, timeout_s: float) -> Waited:
    """Asks /healthz/ready until the variant is `version` (None: no challenger) in ANSWERS_IN_A_ROW answers."""
    start, in_a_row, heard = time.monotonic(), 0, False
    while (waited := time.monotonic() - start) < timeout_s:
        body = _ask(url, "/healthz/ready")
        if body is None and not heard:
            return Waited("silent", waited)
        heard = True
        if body is not None and str(version) in body.get("failed", []):
            return Waited("refused", waited, _reason(url, str(version)))
        in_a_row = in_a_row + 1 if body is not None and _answers(body, variant) == version else 0
        if in_a_row >= ANSWERS_IN_A_ROW:
            return Waited("serves", waited)
        if not in_a_row:
            time.sleep(LOOK_S)
    return Waited("late", waited)


def _answers(body: dict[str, Any], variant: Variant) -> int | None:
    model = body.get("model" if variant == "champion" else "challenger") or {}
    version = str(model.get("version", ""))
    return int(version) if version.isdecimal() else None


def _reason(url: str, version: str) -> str:
    body = _ask(url, "/v1/models") or {}
    failed = body.get("registry", {}).get("failed", [])
    return next((str(one["reason"]) for one in failed if one.get("version") == version), "see GET /v1/models")


def _ask(url: str, path: str) -> dict[str, Any] | None:
    """The JSON object of an answer that is fine; None otherwise."""
    parts = urlsplit(url)
    secure = parts.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port or (443 if secure else 80), timeout=5)
    try:
        connection.request("GET", parts.path.rstrip("/") + path, headers=_key())
        response = connection.getresponse()
        body = json.loads(response.read())
        return body if response.status == 200 and isinstance(body, dict) else None
    except (OSError, http.client.HTTPException, ValueError):
        return None
    finally:
        connection.close()


def _key() -> dict[str, str]:
    key = os.environ.get("SEQRAY_KEY")  # /healthz/ready needs none, /v1/models may
    return {"Authorization": f"Bearer {key}"} if key else {}
