"""The peer's environment: a virtual environment of its own with RecTools, pinned by rectools-requirements.txt.

python -m benchmarks.peer_environment [--output .seqray]
"""

import argparse
import hashlib
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).with_name("rectools-requirements.txt")
STAMP = "installed.txt"


def ensure_environment(output: Path) -> Path:
    """The Python of `<output>/venvs/rectools`, built now unless it is there with just these packages.

    Errors: subprocess.CalledProcessError when pip fails; its own messages stand above.
    """
    folder = output.absolute() / "venvs" / "rectools"
    python, stamp, wanted = folder / "bin" / "python", folder / STAMP, _fingerprint()
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    print(f"building {folder} (about a minute)", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", str(REQUIREMENTS)]
    subprocess.run([str(python), *install], check=True, stdout=sys.stderr)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def _fingerprint() -> str:
    # Another Python means other wheels.
    return hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()


def main() -> None:
    """Builds the environment and prints its Python."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".seqray"), help="folder of everything that is made")
    print(ensure_environment(parser.parse_args().output))


if __name__ == "__main__":
    main()
