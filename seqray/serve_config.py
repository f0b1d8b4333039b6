"""The section of the endpoint: `serve`."""

import ipaddress
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from seqray.sections import Section


class KeysConfig(Section):
    """Keys of those who ask, made by `python -m serve keys add`."""

    required: Literal["auto", "always", "never"] = "auto"
    """auto: unless the endpoint listens on loopback only."""
    file: str | None = None
    """Key file, local (then on a disk that all replicas see) or a URI; `keys/NAME.json` in `output` when null."""
    reload_s: float = Field(5.0, gt=0, le=3600)
    """Seconds between a replica's looks at the file, so the time until a revoked key is refused everywhere."""
    rate_per_s: float | None = Field(None, gt=0)
    """Requests a second that each replica answers to one key; one more is answered 429. null: no limit."""
    burst: int = Field(100, ge=1)
    """Requests that a key may send at once on top of that, after a pause."""


class LogConfig(Section):
    """The request log: JSON lines in the standard output of the replicas."""

    sample: float = Field(0.01, ge=0, le=1)
    """Share of the requests that are logged; errors always are, up to 50 a second."""


class EventsConfig(Section):
    """What `POST /v1/events` takes and where it goes."""

    folder: str | None = None
    """Folder or URI of the log of events; none are taken when null. On storage that all nodes share."""
    commit_wait_ms: float = Field(5.0, ge=0, le=1000)
    """Milliseconds that events wait for those of other requests, to be written in one file."""
    commit_timeout_s: float = Field(10.0, gt=0)
    """Seconds until a request whose events are not durable yet is answered 503."""
    max_buffered_events: int = Field(10_000, ge=500)
    """Events that a replica holds until they are durable; more are answered 503 with Retry-After."""
    max_buffered_mib: float = Field(16.0, ge=4)
    """The same for their size, in MiB."""
    dedupe_window: int = Field(200_000, ge=1)
    """A replica knows an event that comes again by the ids of at least so many events: the newest it wrote, and
    those of today and yesterday that were there when it began.
    """
    max_age_days: float = Field(30.0, gt=0)
    """Events older than that are refused, as are those more than a day ahead."""


class BatchScoringConfig(Section):
    """`python -m serve.batch`: the best items of every user of the store."""

    k: int = Field(20, ge=1)
    """Items of each user."""
    exclude_seen: bool | None = None
    """Leave the items of a user's history out; as the model was evaluated when null."""
    filter: dict[str, Any] | None = None
    """Only items that it lets through, as in a request; null: all."""
    users_a_file: int = Field(10_000, ge=1)
    """Users of one file of the output, which is also what a killed job repeats."""
    batch_size: int = Field(256, ge=1)
    """Users ranked in one forward pass, of histories of about the same length."""
    num_workers: int | None = Field(None, ge=1)
    """Processes, each with `cpus_per_replica` cores (one GPU where `device` is cuda); as many as the cluster has room
    for when null.
    """


class RetrievalConfig(Section):
    """How the best items are found."""

    type: Literal["exact", "hnsw", "ivfpq"] = "exact"
    """exact scores every item, well up to about 1 M of them; hnsw (a graph, fastest, most memory) and ivfpq (compressed
    lists, least memory) are indexes of faiss on the CPU that find candidates, which are then scored exactly."""
    candidates: int = Field(300, ge=1)
    """Items that an index finds for a request, at least; more where k and the excluded items are more."""
    neighbours: int = Field(32, ge=2)
    """hnsw: links of an item."""
    effort: int = Field(200, ge=1)
    """hnsw: items that a search and the building of the graph keep in sight; more is slower and finds more."""
    lists: int | None = Field(None, ge=1)
    """ivfpq: lists that the items are cut into; 4 times the square root of their number when null."""
    probes: int = Field(64, ge=1)
    """ivfpq: lists that a search looks through."""
    min_recall: float = Field(0.9, ge=0, le=1)
    """Share of the exact 20 best that an index must find when it is built; below, it is refused."""


class ServeConfig(Section):
    """The endpoint."""

    bundle: str | None = None
    """Bundle to deploy; with a registry, the first one where it has none yet."""
    registry: str | None = None
    """Folder of the versions that `python -m serve promote` and `rollback` change under running replicas."""
    registry_poll_s: float = Field(1.0, gt=0)
    """Seconds between a replica's looks for a change of the registry."""
    canary_share: float = Field(0.0, ge=0, le=1)
    """Share of the users, by a hash of user_id or else session_id, that the challenger answers."""
    shadow: bool = False
    """Ask the challenger too what the champion answered; compared, counted and logged, never returned."""
    max_bundle_mb: float = Field(4096, gt=0)
    """Size of a bundle's files, in millions of bytes, above which it is refused."""
    max_items: int = Field(20_000_000, ge=1)
    """Items of a bundle above which it is refused."""
    host: str = "127.0.0.1"
    """Address to listen on; loopback unless told otherwise."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    playground: Literal["auto", "on", "off"] = "auto"
    """The page at / on which people try the model; auto: when host is a loopback address."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where a replica ranks; cuda reserves one GPU for each replica."""
    retrieval: RetrievalConfig = RetrievalConfig()
    cpus_per_replica: float = Field(1.0, gt=0)
    """CPU cores of one replica; the model uses as many threads."""
    min_replicas: int = Field(1, ge=0)
    """Replicas kept when idle; 0 scales to zero."""
    max_replicas: int = Field(2, ge=1)
    """Replicas at the most."""
    target_ongoing_requests: float = Field(16.0, gt=0)
    """Requests in flight for each replica that autoscaling aims at."""
    upscale_delay_s: float = Field(0.5, ge=0)
    """Seconds of load above the target before replicas are added. A target of a few requests is passed by chance too
    often: with 2 replicas are not added for nothing."""
    downscale_delay_s: float = Field(60.0, ge=0)
    """Seconds of load below the target before replicas are removed."""
    downscale_to_zero_delay_s: float = Field(300.0, ge=0)
    """The same for the last one, with min_replicas: 0. Load is sampled: requests far apart may pass for none."""
    metrics_interval_s: float = Field(0.25, gt=0)
    """Seconds between the replicas' load reports; Ray's own default of 10 makes autoscaling slow. Each costs
    Ray's controller about a millisecond of CPU: with a hundred replicas take 1, and 2 for look_back_s."""
    look_back_s: float = Field(1.0, gt=0)
    """Seconds over which the load is averaged; of Ray's own default of 30, ten pass before a rise counts."""
    max_batch_size: int = Field(32, ge=1)
    """Requests ranked in one forward pass."""
    max_ongoing_requests: int = Field(64, ge=1)
    """Requests a replica holds at a time."""
    max_queued_requests: int = Field(128, ge=0)
    """Requests that may wait for a replica; one more is answered 503 with Retry-After."""
    deadline_ms: int = Field(2000, ge=1)
    """Milliseconds after which a request that names no deadline is answered 504, and its work dropped."""
    retry_after_s: int = Field(1, ge=1)
    """Seconds in that Retry-After."""
    high_throughput: bool = True
    """Ray Serve's HAProxy ingress and throughput profile."""
    body_timeout_s: float = Field(10.0, gt=0, le=3600)
    """Seconds that the head and the body of a request may take to arrive; then it is answered 408."""
    keys: KeysConfig = KeysConfig()
    log: LogConfig = LogConfig()
    events: EventsConfig = EventsConfig()
    batch: BatchScoringConfig = BatchScoringConfig()

    @property
    def on_loopback(self) -> bool:
        """Whether this machine alone can reach the endpoint."""
        return is_loopback(self.host)

    @property
    def shows_playground(self) -> bool:
        """Whether the page is served."""
        return self.playground == "on" or (self.playground == "auto" and self.on_loopback)

    @model_validator(mode="after")
    def _index_is_on_the_cpu(self) -> Self:
        if self.device == "cuda" and self.retrieval.type != "exact":
            raise ValueError(f"retrieval.type {self.retrieval.type} searches on the CPU; device cuda takes exact")
        return self

    @model_validator(mode="after")
    def _replicas_fit(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas {self.min_replicas} is above max_replicas {self.max_replicas}")
        return self

    @model_validator(mode="after")
    def _load_is_averaged(self) -> Self:
        if self.look_back_s <= self.metrics_interval_s:
            raise ValueError(
                f"look_back_s {self.look_back_s:g} is not above metrics_interval_s {self.metrics_interval_s:g}"
            )
        return self

    @model_validator(mode="after")
    def _challenger_is_registered(self) -> Self:
        if self.registry is None and (self.canary_share or self.shadow):
            raise ValueError(
                "canary_share and shadow are about the challenger of a registry; name it by serve.registry"
            )
        return self


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
