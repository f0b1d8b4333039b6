"""deploy(config): a bundle becomes a Ray Serve application that answers over HTTP.

What imports PyTorch or Ray is imported inside the functions, so that a mistake in the config is answered at once.
"""

import contextlib
import io
import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seqray.command import end_in_order_on_sigterm
from seqray.config import Config
from seqray.errors import BundleError, ConfigError
from serve.cluster import check_resources, connect

if TYPE_CHECKING:
    from seqray.bundle import Bundle

WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - shown as an address that can be asked
CONSTRUCTOR_TRIES = 3
DEPLOYMENT = "recommender"
LOGGING = {"enable_access_log": False, "log_level": "WARNING"}
"""Of a replica. Below WARNING Ray Serve makes a record for the access log even where that is off."""


@dataclass(frozen=True)
class Deployment:
    """A running application; `is_local` when its cluster ends with this process, `asks_keys` when it asks for keys."""

    url: str
    application: str
    bundle: "Bundle"
    version: str
    """As the answers name it: its number in the registry, or without one the run that made it."""
    is_local: bool
    asks_keys: bool
    metrics_urls: tuple[str, ...]
    """Where Ray exports the metrics of each node."""


def deploy(config: Config) -> str:
    """Serves `config.serve.bundle` under the name of the config and returns the URL; see `start`."""
    return start(config).url


def start(config: Config) -> Deployment:
    """Verifies the bundle, finds or starts the cluster, and waits until the replicas are ready.

    A local cluster lives as long as this process. ConfigError or BundleError when something does not fit.
    """
    from serve import keys

    bundle, version = _verified_bundle(config)
    keys.resolved(config, config.serve.host)
    _build_index(config, bundle)
    is_local = connect(config)
    try:
        end_in_order_on_sigterm()  # also while the replicas start
        check_resources(config)
        url = _run(config, bundle)
    except BaseException:
        stop_cluster(is_local)
        raise
    asks_keys = keys.are_required(config.serve.keys.required, _http_options().host)
    return Deployment(url, config.name, bundle, version, is_local, asks_keys, _metrics_urls())


def _build_index(config: Config, bundle: "Bundle") -> None:
    """Has an index of the bundle in this machine's cache before its replicas start, so that its recall is told here."""
    if config.serve.retrieval.type != "exact":
        from seqray.cache import Cache
        from seqray.recommender import Recommender

        folder = Cache.of(config.cluster).index_folder
        Recommender(bundle, retrieval=config.serve.retrieval, index_folder=folder)


def stop(deployment: Deployment) -> None:
    """Takes the application away, and the cluster when it is ours."""
    import ray.serve

    if not deployment.is_local:
        ray.serve.delete(deployment.application)
    stop_cluster(deployment.is_local)


def stop_cluster(is_local: bool) -> None:
    """Shuts a local cluster down; leaves another one alone."""
    import ray
    import ray.serve

    if is_local and ray.is_initialized():
        # Serve's controller ends by killing itself, of which Ray then prints a warning with every shutdown.
        with contextlib.redirect_stdout(io.StringIO()):
            ray.serve.shutdown()  # first: HAProxy would outlive a cluster that just vanishes
            ray.shutdown()


def _verified_bundle(config: Config) -> tuple["Bundle", str]:
    from serve.promote import first_bundle, named_bundle

    if config.serve.registry is None:
        return named_bundle(config)
    bundle, number = first_bundle(config)
    return bundle, str(number)


def _run(config: Config, bundle: "Bundle") -> str:
    import ray.serve
    from ray.serve.exceptions import RayServeException

    from seqray.cache import Cache
    from seqray.folder import Folder
    from serve import keys

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve = config.serve
    ray.serve.start(http_options={"host": serve.host, "port": serve.port}, logging_config={"enable_access_log": False})
    cache = Cache.of(config.cluster)  # each node has its own copy of a bundle behind a URI
    registry = None if serve.registry is None else str(Folder.at(serve.registry))  # replicas run in other folders
    keys_there = keys.resolved(config, _http_options().host)
    settings = serve.model_copy(update={"registry": registry, "keys": keys_there}).model_dump(mode="json")
    settings["events"]["folder"] = _events_folder(serve.events.folder)
    application = _deployment(config).bind(bundle.location, config.component_types, config.name, settings, cache)
    try:
        ray.serve.run(application, name=config.name, route_prefix="/")
    except RayServeException as error:
        raise ConfigError(f"name: {config.name!r} cannot be deployed: {_last_words(str(error))}") from error
    except RuntimeError as error:
        reason = _last_words(_status_message(config.name) or str(error))
        raise BundleError(f"{bundle.location}: the replicas did not become ready: {reason}") from error
    return _url()


def _events_folder(folder: str | None) -> str | None:
    """The folder under a name that means the same to every replica; DataError when it cannot be reached."""
    from seqray.folder import Folder

    if folder is None:
        return None
    Folder.at(folder).names()
    return Folder.at(folder).location


def _deployment(config: Config) -> Any:
    import ray.serve

    from serve.replica import Replica

    serve = config.serve
    resources = {"num_cpus": serve.cpus_per_replica, "num_gpus": 1 if serve.device == "cuda" else 0}
    return ray.serve.deployment(
        name=DEPLOYMENT,
        max_ongoing_requests=serve.max_ongoing_requests,
        # HAProxy's replicas count a request as queued on arrival: with 0 they would refuse every one.
        max_queued_requests=max(1, serve.max_queued_requests),
        backpressure_config={"status_code": 503, "retry_after_s": serve.retry_after_s},
        ray_actor_options=resources,
        autoscaling_config={
            "min_replicas": serve.min_replicas,
            "max_replicas": serve.max_replicas,
            "initial_replicas": max(1, serve.min_replicas),
            "target_ongoing_requests": serve.target_ongoing_requests,
            "upscale_delay_s": serve.upscale_delay_s,
            "downscale_delay_s": serve.downscale_delay_s,
            "downscale_to_zero_delay_s": serve.downscale_to_zero_delay_s,
            "metrics_interval_s": serve.metrics_interval_s,
            "look_back_period_s": serve.look_back_s,
        },
        logging_config=LOGGING,
        max_constructor_retry_count=CONSTRUCTOR_TRIES,
    )(ray.serve.ingress()(Replica))


def url_of(host: str, port: int) -> str:
    """Where to ask what listens on host:port."""
    host = WILDCARDS.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _http_options() -> Any:
    # A cluster that served before keeps its address, whatever is asked now; no public function tells it.
    from ray.serve.context import _get_global_client

    return _get_global_client().http_config


def _url() -> str:
    options = _http_options()
    return url_of(options.host, options.port)


def _metrics_urls() -> tuple[str, ...]:
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"] and node["MetricsExportPort"]]
    return tuple(f"{url_of(node['NodeManagerAddress'], node['MetricsExportPort'])}/metrics" for node in nodes)


def _status_message(name: str) -> str:
    import ray.serve

    status = ray.serve.status().applications.get(name)
    return "\n".join(part.message for part in status.deployments.values()) if status else ""


def _last_words(text: str) -> str:
    """The last error that a traceback of Ray names, without the traceback."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception):", line)]
    return (named or lines or ["no reason given"])[-1]
