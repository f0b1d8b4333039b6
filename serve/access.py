"""What each path asks of a key: a scope, or nothing. Paths that do not stand here ask for `recommend`."""

from typing import NamedTuple

from serve.keys import Scope


class Access(NamedTuple):
    """What a path is called in metrics and logs, and the scope that opens it; None: open to all."""

    endpoint: str
    scope: Scope | None


OTHER = Access("other", "recommend")
PATHS = {
    "/v1/recommend": Access("recommend", "recommend"),
    "/v1/recommend:batch": Access("recommend:batch", "recommend"),
    "/v1/similar-items": Access("similar-items", "recommend"),
    "/v1/rank": Access("rank", "recommend"),
    "/v1/explain": Access("explain", "recommend"),
    "/v1/models": Access("models", "recommend"),
    "/v1/items": Access("items", "recommend"),
    "/v1/events": Access("events", "events"),
    "/metrics": Access("metrics", "metrics"),
    # Load balancers and Kubernetes ask these without keys.
    "/healthz/live": Access("live", None),
    "/healthz/ready": Access("ready", None),
    "/v2/health/live": Access("live", None),
    "/v2/health/ready": Access("ready", None),
    # The same for everybody who runs this version: nothing of the shop is in them.
    "/openapi.json": Access("openapi", None),
    "/docs": Access("docs", None),
    "/": Access("page", None),
}
PAGE_FOLDER = "/playground/"


def access(path: str) -> Access:
    """What `path` asks."""
    found = PATHS.get(path)
    if found is None:
        return PATHS["/"] if path.startswith(PAGE_FOLDER) else OTHER
    return found
