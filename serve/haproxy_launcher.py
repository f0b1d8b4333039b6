"""Started in the place of HAProxy: makes the configuration that Ray Serve wrote private, then becomes HAProxy.

Ray Serve binds HAProxy's metrics and statistics to all interfaces, answers 500 when no replica is up, and lets a client
take an hour to send a request; it offers no settings for these. Arguments: the real binary, the folder of our answers
(408.http, 503.http), the seconds that a request may take to arrive, then HAProxy's own arguments.
Runs as a plain script, with the standard library alone.
"""

import os
import re
import sys
from pathlib import Path

MAX_HEADERS = 512
"""More than the application lets pass, so that it is the one who says so; of still more HAProxy says 400."""
INTERNAL_SECTIONS = ("frontend prometheus", "listen stats")
SECTION = re.compile(r"(frontend|backend|listen|defaults|global)\b")
BIND = re.compile(r"(\s*bind\s+)\*?:(\d+)\s*")
ERROR_FILE = re.compile(r"(\s*errorfile\s+50[234]\s+)\S+\s*")


def make_private(text: str, folder: str, request_timeout_s: str) -> str:
    """The configuration with HAProxy's own pages on loopback, our answers in `folder`, and an end to slow requests.

    HAProxy holds a request back until its body is there (or its first 16 KB), so slow ones take no place in a replica.
    It tells Ray Serve's process beside it, in Python, of those requests only that failed: a line for each cost as much
    as HAProxy itself, of cores that the replicas need.
    """
    added = {
        "global": [f"tune.http.maxhdr {MAX_HEADERS}"],
        "defaults": [
            "option http-buffer-request", f"timeout http-request {request_timeout_s}s", "option dontlog-normal",
            f"errorfile 408 {folder}/408.http",
        ],
    }  # fmt: skip
    lines = []
    section = ""
    for line in text.splitlines():
        if SECTION.match(line):
            section = line.strip()
        bind, error = BIND.fullmatch(line), ERROR_FILE.fullmatch(line)
        if bind and section in INTERNAL_SECTIONS:
            lines.append(f"{bind[1]}127.0.0.1:{bind[2]}")
        elif error:
            lines.append(f"{error[1]}{folder}/503.http")
        else:
            lines.append(line)
        lines += [f"    {setting}" for setting in added.get(line.strip(), ())]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Rewrites the file after -f and replaces this process by HAProxy."""
    binary, folder, request_timeout_s, *rest = arguments
    path = Path(rest[rest.index("-f") + 1])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    text = make_private(path.read_text(encoding="utf-8"), folder, request_timeout_s)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    os.execv(binary, [binary, *rest])  # noqa: S606 - no shell on purpose; the arguments are Ray Serve's


if __name__ == "__main__":
    main(sys.argv[1:])
