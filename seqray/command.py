"""What the commands share: CONFIG [path=value ...], --dry-run, and errors without a traceback."""

import argparse
import json
import os
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seqray.config import Config, load_config
from seqray.errors import ConfigError, SeqrayError


@dataclass(frozen=True)
class Flag:
    """An option of one command beside the common ones: a switch, or a value when `metavar` is given."""

    name: str
    help: str
    metavar: str | None = None


Body = Callable[[Config, argparse.Namespace], None]

JSON_FLAG = Flag("--json", "also write the result as JSON", metavar="FILE")


def run_command(
    name: str, about: str, body: Body, flags: Sequence[Flag] = (), argv: Sequence[str] | None = None
) -> int:
    """Parses the command line, loads the config and calls `body`; returns the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=about)
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    parser.add_argument("overrides", metavar="path=value", nargs="*", help="replaces a value of the config")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    for flag in flags:
        if flag.metavar:
            parser.add_argument(flag.name, metavar=flag.metavar, help=flag.help)
        else:
            parser.add_argument(flag.name, action="store_true", help=flag.help)
    arguments = parser.parse_intermixed_args(argv)

    def run() -> None:
        config = load_config(arguments.config, tuple(arguments.overrides))
        if arguments.dry_run:
            print(config.yaml(), end="")
        else:
            _check_writable(getattr(arguments, "json", None))
            body(config, arguments)

    return run_safely(run)


def run_safely(body: Callable[[], None]) -> int:
    """Calls what a command does; prints what a user got wrong without a traceback. The exit status (2: wrong input)."""
    _find_modules_here()
    end_in_order_on_sigterm()
    # Threads that wait must not spin: on shared cores they would take the time that the working ones need.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        body()
    except SeqrayError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def end_in_order_on_sigterm() -> None:
    """Told to end, by whatever means, a command ends in order: SIGTERM raises KeyboardInterrupt.

    To be said again after ray.init, which puts its own handler there; only the main thread can.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def next_command(module: str, arguments: argparse.Namespace, *overrides: str) -> str:
    """The command line of another command for the same config and overrides, and more of them."""
    return shlex.join(["python", "-m", module, arguments.config, *arguments.overrides, *overrides])


def write_json(path: str | Path, data: Any) -> None:
    """Writes JSON under a temporary name, then renames it."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def _check_writable(path: str | None) -> None:
    """ConfigError before the work, not after it."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--json: cannot write {path}: {error}") from error
    if not os.access(folder, os.W_OK) or Path(path).is_dir():
        raise ConfigError(f"--json: cannot write {path}")


def _find_modules_here() -> None:
    # A component named module:attribute is looked for in the working folder, also by the workers of a cluster.
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
