"""python -m serve promote | rollback | versions: the commands that change and show a registry."""

import argparse
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from seqray.command import run_safely
from seqray.config import Config, load_config
from seqray.errors import BundleError, ConfigError

if TYPE_CHECKING:
    from serve.admission import Admission
    from serve.registry import Change, Registry

OVERRIDE = re.compile(r"[a-z_]+(\.\w+)*=")
YAML_SUFFIXES = (".yaml", ".yml")
EPILOG = "The registry is that of CONFIG (serve.registry), or the folder after --registry, local or s3://."


@dataclass(frozen=True)
class _Words:
    """The words of a command line, told apart: CONFIG ends in .yaml, path=value overrides it."""

    config_path: str | None
    overrides: tuple[str, ...]
    others: tuple[str, ...]
    registry: str | None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "_Words":
        words = list(arguments.words)
        overrides = tuple(word for word in words if OVERRIDE.match(word))
        rest = [word for word in words if not OVERRIDE.match(word)]
        config_path = next((word for word in rest if word.endswith(YAML_SUFFIXES)), None)
        if config_path is not None:
            rest.remove(config_path)
        if overrides and config_path is None:
            raise ConfigError(f"{overrides[0]!r} overrides a config, but no CONFIG (.yaml) is named")
        return cls(config_path, overrides, tuple(rest), arguments.registry)

    @property
    def config(self) -> Config | None:
        """The config, where one is named."""
        return None if self.config_path is None else load_config(self.config_path, self.overrides)

    def command(self, verb: str, *more: str) -> str:
        """The command line of another verb for the same registry."""
        words = ["python", "-m", "serve", verb, *([self.config_path] if self.config_path else []), *more]
        registry = ["--registry", self.registry] if self.registry else []
        return shlex.join([*words, *registry, *self.overrides])


def promote_command(argv: Sequence[str]) -> int:
    """The command; the exit status (2: wrong input, or an endpoint that refused the version)."""
    parser = _parser("promote", "[CONFIG] [BUNDLE] [path=value ...]", "Make a bundle the champion, or the challenger.")
    parser.add_argument("--version", type=int, metavar="N", help="a version of the registry in place of BUNDLE")
    parser.add_argument("--challenger", action="store_true", help="for serve.canary_share and serve.shadow")
    arguments = _with_wait(parser).parse_intermixed_args(argv)
    return run_safely(lambda: _promote(arguments, _Words.of(arguments)))


def rollback_command(argv: Sequence[str]) -> int:
    """The command; the exit status."""
    about = "Make the champion of before the champion again; said again, the one before that."
    parser = _parser("rollback", "[CONFIG] [path=value ...]", about)
    parser.add_argument("--challenger", action="store_true", help="take the challenger away; the champion stays")
    arguments = _with_wait(parser).parse_intermixed_args(argv)
    return run_safely(lambda: _rollback(arguments, _Words.of(arguments)))


def versions_command(argv: Sequence[str]) -> int:
    """The command; the exit status."""
    parser = _parser("versions", "[CONFIG] [path=value ...]", "Show the versions, the aliases and who changed them.")
    arguments = parser.parse_intermixed_args(argv)
    return run_safely(lambda: _versions(_Words.of(arguments)))


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "promote": promote_command,
    "rollback": rollback_command,
    "versions": versions_command,
}


def _parser(name: str, usage: str, about: str) -> argparse.ArgumentParser:
    prog = f"python -m serve {name}"
    parser = argparse.ArgumentParser(prog, f"{prog} {usage} [options]", about, EPILOG)
    parser.add_argument("words", nargs="*", metavar=usage, help="in any order")
    parser.add_argument("--registry", metavar="FOLDER", help="in place of serve.registry")
    return parser


def _with_wait(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--why", default="", metavar="TEXT", help="for the audit")
    parser.add_argument("--wait", metavar="URL", help="endpoint to wait for; serve.host and serve.port of CONFIG")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until the endpoint serves it")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="seconds to wait at the most")
    return parser


def _promote(arguments: argparse.Namespace, words: _Words) -> None:
    if len(words.others) > 1:
        raise ConfigError(f"one BUNDLE is promoted, {len(words.others)} are named: {', '.join(words.others)}")
    if (arguments.version is None) == (not words.others):
        raise ConfigError("name the BUNDLE (folder or URI), or a version of the registry by --version, and not both")
    config, registry = _opened(words)
    url = _url(arguments, config)
    from seqray.folder import Folder
    from serve.promote import promote

    given = arguments.version if arguments.version is not None else str(Folder.at(words.others[0]))
    version, change = promote(
        registry, _admission(config), given, challenger=arguments.challenger, why=arguments.why
    )  # fmt: skip
    metric = next((f", {key} {value:.4f}" for key, value in version.metrics.items() if key == "test/ndcg@10"), "")
    print(f"version {version.number}: run {version.run_id}, {version.num_items:,} items{metric}")
    _finish(arguments, words, change, url)


def _rollback(arguments: argparse.Namespace, words: _Words) -> None:
    _no_more(words)
    config, registry = _opened(words)
    url = _url(arguments, config)
    from serve.promote import rollback, withdraw

    if arguments.challenger:
        change = withdraw(registry, arguments.why)
    else:
        change = rollback(registry, _admission(config), arguments.why)
    _finish(arguments, words, change, url)


def _versions(words: _Words) -> None:
    _no_more(words)
    _, registry = _opened(words)
    from serve.registry_report import print_registry

    print_registry(registry)
    print(f"next:  {words.command('promote', 'BUNDLE')}")


def _finish(arguments: argparse.Namespace, words: _Words, change: "Change", url: str | None) -> None:
    print(f"{change.alias}: {change.old or 'none'} -> {change.new or 'none'}  (change {change.number} by {change.who})")
    back = words.command("rollback", *(["--challenger"] if change.alias == "challenger" else []))
    if url is not None:
        _wait(url, change, arguments.timeout, back, asked=arguments.wait is not None)
    print(f"back:  {back}" if change.action != "withdraw" else f"next:  {words.command('versions')}", flush=True)


def _wait(url: str, change: "Change", timeout_s: float, back: str, asked: bool) -> None:
    from serve.endpoint import wait_for

    what = f"version {change.new}" if change.new is not None else f"no {change.alias}"
    waited = wait_for(url, change.new, change.alias, timeout_s)
    match waited.state:
        case "serves":
            print(f"{url} serves {what} as {change.alias} after {waited.seconds:.1f} s")
        case "silent" if not asked:
            print(f"nothing answers at {url}; a replica takes {what} when it starts")
        case "silent":
            raise ConfigError(f"--wait: nothing answers at {url}; the registry says {what} all the same")
        case "refused":
            raise BundleError(f"{url} refused {what}: {waited.reason}; what answered before answers on; back: {back}")
        case "late":
            raise ConfigError(
                f"{url} does not serve {what} after {timeout_s:g} s; ask it: GET /v1/models; back: {back}"
            )


def _opened(words: _Words) -> tuple[Config | None, "Registry"]:
    config = words.config
    location: str | None = words.registry
    if location is None and config is not None:
        location = config.serve.registry
    if location is None:
        raise ConfigError("name the registry: --registry FOLDER, or a CONFIG with serve.registry")
    from serve.registry import Registry

    return config, Registry.at(location)


def _admission(config: Config | None) -> "Admission":
    from serve.admission import Admission

    return Admission.of(config) if config is not None else Admission.by_default()


def _url(arguments: argparse.Namespace, config: Config | None) -> str | None:
    from serve.deploy import url_of
    from serve.endpoint import check_url

    if arguments.no_wait:
        return None
    if arguments.wait is not None:
        check_url(arguments.wait)
        return str(arguments.wait)
    return None if config is None else url_of(config.serve.host, config.serve.port)


def _no_more(words: _Words) -> None:
    if words.others:
        raise ConfigError(f"{words.others[0]!r} is neither a CONFIG (.yaml) nor path=value")
