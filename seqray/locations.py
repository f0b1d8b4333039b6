"""Locations as text: local paths and URIs."""

from pathlib import Path
from urllib.parse import urlsplit

NO_SECRETS = "no keys or passwords in a URI; give them to the environment, such as AWS_SECRET_ACCESS_KEY"


def is_uri(path: str | Path) -> bool:
    """Whether `path` names a remote filesystem; `file://` counts as local."""
    return "://" in str(path) and not str(path).startswith("file://")


def holds_secret(path: str | Path) -> bool:
    """Whether a URI carries a password or secret key, which would end up in logs, configs and bundles."""
    return is_uri(path) and urlsplit(str(path)).password is not None


def local_path(path: str | Path) -> Path:
    """The path of a local file or folder, given plainly or as file://."""
    return Path(str(path).removeprefix("file://")).expanduser()


def join(location: str, name: str) -> str:
    """The path or URI of `name` in the folder at `location`; the options of a URI (`?endpoint_override=...`) stay."""
    place, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    return place.rstrip("/") + ("/" if name else "") + name + mark + options


def split(location: str) -> tuple[str, str]:
    """The folder and the name of a file at a path or URI, so that `join` makes the location of them again."""
    place, mark, options = location.partition("?") if is_uri(location) else (location, "", "")
    folder, slash, name = place.rpartition("/")
    return (folder or slash or ".") + mark + options, name
