"""Started in the place of HAProxy: makes the configuration that Ray Serve wrote private, then becomes HAProxy.

Ray Serve binds HAProxy's metrics and statistics to all interfaces and offers no setting for it, and answers 500 when
no replica is up. Arguments: the real binary, the file of our 503 answer, then HAProxy's own arguments.
Runs as a plain script, with the standard library alone.
"""

import os
import re
import sys
from pathlib import Path

INTERNAL_SECTIONS = ("frontend prometheus", "listen stats")
SECTION = re.compile(r"(frontend|backend|listen|defaults|global)\b")
BIND = re.compile(r"(\s*bind\s+)\*?:(\d+)\s*")
ERROR_FILE = re.compile(r"(\s*errorfile\s+50[234]\s+)\S+\s*")


def make_private(text: str, error_file: str) -> str:
    """The configuration with HAProxy's own pages on loopback and `error_file` as its answer to 502, 503 and 504."""
    lines = []
    section = ""
    for line in text.splitlines():
        if SECTION.match(line):
            section = line.strip()
        bind, error = BIND.fullmatch(line), ERROR_FILE.fullmatch(line)
        if bind and section in INTERNAL_SECTIONS:
            lines.append(f"{bind[1]}127.0.0.1:{bind[2]}")
        elif error:
            lines.append(f"{error[1]}{error_file}")
        else:
            lines.append(line)
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> None:
    """Rewrites the file after -f and replaces this process by HAProxy."""
    binary, error_file, *rest = arguments
    path = Path(rest[rest.index("-f") + 1])
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(make_private(path.read_text(encoding="utf-8"), error_file), encoding="utf-8")
    os.replace(temporary, path)
    os.execv(binary, [binary, *rest])  # noqa: S606 - no shell on purpose; the arguments are Ray Serve's


if __name__ == "__main__":
    main(sys.argv[1:])
