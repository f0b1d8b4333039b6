"""python -m serve CONFIG serve.bundle=PATH: serves until it is told to stop.

python -m serve promote | rollback | versions: changes and shows the registry whose models it serves.
python -m serve keys: makes, shows and takes away the keys that it asks for.
"""

import argparse
import json
import shlex
import signal
import sys
import threading
from types import FrameType
from typing import TYPE_CHECKING

from seqray.command import Flag, run_command
from seqray.config import Config
from seqray.errors import ConfigError
from serve.registry_commands import COMMANDS

if TYPE_CHECKING:
    from serve.deploy import Deployment

NO_WAIT = Flag("--no-wait", "end when the application is ready; it stays up in the cluster that was joined")


def main() -> int:
    """The command; the exit status."""
    if len(sys.argv) > 1 and sys.argv[1] in COMMANDS:
        return COMMANDS[sys.argv[1]](sys.argv[2:])
    if sys.argv[1:2] == ["keys"]:
        from serve.keys_command import keys_command

        return keys_command(sys.argv[2:])
    return run_command("serve", "Serve a bundle over HTTP with Ray Serve.", _serve, [NO_WAIT])


def _serve(config: Config, arguments: argparse.Namespace) -> None:
    from serve.deploy import start, stop

    if arguments.no_wait and config.cluster.address == "local":
        raise ConfigError("--no-wait: a local cluster ends with this command; join one with cluster.address")
    told = threading.Event()

    def tell(_signal: int, _frame: FrameType | None) -> None:
        told.set()

    deployment = start(config)
    signal.signal(signal.SIGTERM, tell)
    signal.signal(signal.SIGINT, tell)
    _announce(config, deployment)
    if arguments.no_wait and not deployment.is_local:
        print("the application stays up; `serve status` shows it", flush=True)
        return
    if arguments.no_wait:
        print("no cluster was running: this one ends with the command, so it waits", file=sys.stderr)
    print("stop it with Ctrl-C", flush=True)
    told.wait()
    print("stopping", flush=True)
    stop(deployment)


def _announce(config: Config, deployment: "Deployment") -> None:
    bundle = deployment.bundle
    popular = bundle.items.sort_by([("train_events", "descending")]).column("item_id").slice(0, 2).to_pylist()
    body = {"history": [item if isinstance(item, int) else str(item) for item in popular], "k": 5}
    titles = '"metadata"' if len(bundle.items.column_names) > 2 else ""
    if titles:
        body["include"] = ["score", "metadata"]
    named = bundle.version if config.serve.registry is None else f"version {deployment.version}, run {bundle.version}"
    print(f"serving {named} ({bundle.num_items:,} items) at {deployment.url}")
    print(f"  ready: {deployment.url}/healthz/ready")
    key = '-H "Authorization: Bearer $SEQRAY_KEY" ' if deployment.asks_keys else ""
    print(
        f"  ask:   curl -s {deployment.url}/v1/recommend -H 'Content-Type: application/json' {key}"
        f"-d {shlex.quote(json.dumps(body, ensure_ascii=False))}"
    )
    if config.serve.shows_playground:
        print(f"  try:   {deployment.url}/ in a browser")
    print(f"  metrics: {', '.join(deployment.metrics_urls)} (of Ray, with those of all replicas)")
    if deployment.asks_keys:
        print("  keys:  SEQRAY_KEY is to hold one of `python -m serve keys add`; for TLS see docs/serving.md")
    elif not config.serve.on_loopback:
        print(f"  note:  whoever reaches {config.serve.host} may ask: serve.keys.required is never", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
