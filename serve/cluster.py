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
    if join(config):
        return False
    serve = config.serve
    check_port_is_free(serve.host, serve.port)
    set_environment(serve.high_throughput, serve.retry_after_s, serve.body_timeout_s)
    start_local(math.ceil(serve.cpus_per_replica * serve.max_replicas) + 1)
    return True


def join(config: Config) -> bool:
    """Joins the cluster of `cluster.address`, or one that runs; false where a local one is wanted.

    ConfigError when the address does not answer.
    """
    import ray

    address = config.cluster.address
    if ray.is_initialized():
        return True  # the caller's cluster
    if address is None:
        try:
            ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
            return True
        except ConnectionError as error:
            if os.environ.get("RAY_ADDRESS"):
                raise ConfigError(f"RAY_ADDRESS {os.environ['RAY_ADDRESS']!r}: no Ray cluster answers") from error
    elif address != "local":
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise ConfigError(f"cluster.address: no Ray cluster answers at {address!r}: {error}") from error
        return True
    return False


def start_local(cpus: int) -> None:
    """Starts a cluster of this process, with at least so many CPUs in Ray's books."""
    import ray

    ray.init(
        address="local",
        num_cpus=max(os.cpu_count() or 1, cpus),
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
