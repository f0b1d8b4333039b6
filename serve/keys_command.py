"""python -m serve keys add|list|revoke: makes, shows and takes away the keys of an endpoint."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime

from seqray.command import run_safely
from seqray.config import load_config
from seqray.errors import ConfigError
from serve.keys import DEFAULT_SCOPES, SCOPES, KeyFile, Scope

USAGE = "python -m serve keys {add|revoke} NAME [CONFIG [path=value ...]] [--file FILE]"
EPILOG = "The keys are in --file, or where the config says: serve.keys.file, else keys/NAME.json in its output folder."


def keys_command(argv: Sequence[str]) -> int:
    """The command; the exit status (2: wrong input)."""
    parser = argparse.ArgumentParser(prog="python -m serve keys", description="Keys of the endpoint.", epilog=EPILOG)
    parser.add_argument("verb", choices=["add", "list", "revoke"])
    parser.add_argument("words", nargs="*", metavar="NAME CONFIG path=value", help="list takes no NAME")
    parser.add_argument("--file", help="key file, local or a URI")
    parser.add_argument("--scopes", default=",".join(DEFAULT_SCOPES), help=f"what it opens, of {', '.join(SCOPES)}")
    parser.add_argument("--days", type=float, help="the key expires after so many days")
    arguments = parser.parse_intermixed_args(argv)
    return run_safely(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    words = list(arguments.words)
    if arguments.verb == "list":
        _list(_file(words, arguments.file))
        return
    if not words:
        raise ConfigError(f"no NAME of a key is given: {USAGE}")
    name = words.pop(0)
    file = _file(words, arguments.file)
    if arguments.verb == "revoke":
        file.revoke(name)
        print(f"revoked {name} in {file.location}; replicas refuse it within serve.keys.reload_s seconds")
        return
    scopes = _scopes(arguments.scopes)
    if arguments.days is not None and not 0 < arguments.days <= 36_500:
        raise ConfigError(f"--days {arguments.days:g}: from above 0 to 36500")
    secret = file.add(name, scopes, arguments.days)
    print(f"added {name} ({', '.join(scopes)}) to {file.location}; it is shown this once:", file=sys.stderr)
    print(secret)


def _file(words: Sequence[str], location: str | None) -> KeyFile:
    if (location is None) == (not words):
        raise ConfigError(f"name the config, or the key file by --file, and not both: {USAGE}")
    return KeyFile(location) if location is not None else KeyFile.of(load_config(words[0], tuple(words[1:])))


def _scopes(text: str) -> tuple[Scope, ...]:
    given = [scope.strip() for scope in text.split(",")]
    wrong = [scope for scope in given if scope not in SCOPES]
    if wrong:
        raise ConfigError(f"--scopes: {', '.join(map(repr, wrong))} unknown; choices: {', '.join(SCOPES)}")
    return tuple(scope for scope in SCOPES if scope in given)


def _list(file: KeyFile) -> None:
    keys, now = file.read(), datetime.now(UTC)
    for key in keys:
        until = "never expires" if key.expires is None else f"expires {key.expires:%Y-%m-%d %H:%M} UTC"
        over = " (over)" if key.is_expired(now) else ""
        print(f"{key.name:20} {','.join(key.scopes):26} created {key.created:%Y-%m-%d %H:%M} UTC  {until}{over}")
    print(f"{len(keys)} keys in {file.location}")
