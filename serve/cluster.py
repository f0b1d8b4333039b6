"""The Ray cluster that serves: the one that runs, or one of this process."""

import logging
import math
import os
import socket

from seqray.config import Config
from seqray.errors import ConfigError
from serve.profile import set_environment


def connect(config: Config) -> bool:
    """Joins the cluster of `cluster.address` or starts a local one; true when it started one.

    ConfigError when the address does not answer, or when the port of a local cluster is taken.
    """
    import ray

    address = config.cluster.address
    if ray.is_initialized():
        return False  # the caller's cluster
    if address is None:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            return False
        except ConnectionError as error:
            if os.environ.get("RAY_ADDRESS"):
                raise ConfigError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']!r}: no Ray cluster answers") from error
    elif address != "local":
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"cluster.address: no Ray cluster answers at {address!r}: {error}") from error
        return False
    _start_local(config)
    return True


def _start_local(config: Config) -> None:
    import ray

    check_port_is_free(config.serve.host, config.serve.port)
    serve = config.serve
    set_environment(serve.high_throughput, serve.retry_after_s, serve.body_timeout_s)
    cpus = max(os.cpu_count() or 1, math.ceil(config.serve.cpus_per_replica * config.serve.max_replicas) + 1)
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
    )


def check_port_is_free(host: str, port: int) -> None:
    """ConfigError when nothing could listen on host:port."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"serve.host: {host!r} is not an address of this machine: {error}") from error
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()
        except OSError as error:
            raise ConfigError(
                f"serve.port: cannot listen on {host} port {port}: {error.strerror}; "
                f"choose another, such as serve.port={port % 65535 + 1}"
            ) from error


def check_resources(config: Config) -> None:
    """ConfigError when the cluster has no room for one replica; Ray Serve would wait for it without end."""
    import ray

    has = ray.cluster_resources()
    for name, key, wanted in (
        ("CPU", "serve.cpus_per_replica", config.serve.cpus_per_replica),
        ("GPU", "serve.device: cuda", 1 if config.serve.device == "cuda" else 0),
    ):
        if has.get(name, 0) < wanted:
            raise ConfigError(f"{key}: a replica needs {wanted:g} {name}, the cluster has {has.get(name, 0):g}")
