"""The kernels of this folder, compiled once for a user and loaded into PyTorch as `torch.ops.seqray`.

Those that serve need a CPU with AVX2, those of training one with AVX-512, its bf16 and its VNNI, and all of them, the
first time, a C++ compiler. The product lies beside PyTorch's own extensions (`TORCH_EXTENSIONS_DIR`, else
`~/.cache/torch_extensions`) under a name that changes with the sources, the flags and PyTorch. SEQRAY_NATIVE=off does
without, SEQRAY_NATIVE=avx2 with no more than AVX2.
"""

import fcntl
import hashlib
import logging
import os
import platform
import shlex
import shutil
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from subprocess import PIPE, Popen, SubprocessError
from typing import Any

import torch

FLAGS = ("-O3", "-std=c++20", "-fopenmp", "-fPIC")
OF_TRAINING = frozenset(("attention", "cross_entropy", "linear"))
"""Sources of what AVX2 is not enough for."""
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 600
"""After which a compiler is given up."""
SWITCH = "SEQRAY_NATIVE"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Level:
    """What a CPU can do."""

    flags: tuple[str, ...]
    trains: bool
    """Whether it is enough for the kernels of training."""


AVX512 = Level(("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"), trains=True)
AVX2 = Level(("-mavx2", "-mfma"), trains=False)


def operators(build: bool) -> Any | None:
    """`torch.ops.seqray`, or None where no kernels can run; they are compiled for the first time only if `build`.

    Why they could not be compiled is logged once.
    """
    if os.environ.get(SWITCH) == "off" or _level() is None:
        return None
    is_loaded = bool(_load.cache_info().currsize)  # to look for the file costs more than to ask
    return _load() if is_loaded or build or _file().exists() else None


def operators_of_training(build: bool) -> Any | None:
    """`operators` where those of training are among them, else None."""
    level = _level()
    return operators(build) if level is not None and level.trains else None


@cache
def _level() -> Level | None:
    cpu = torch.cpu
    if platform.system() != "Linux" or not cpu._is_avx2_supported():
        return None
    if os.environ.get(SWITCH) == "avx2" or not (cpu._is_avx512_bf16_supported() and cpu._is_vnni_supported()):
        return AVX2
    return AVX512


def _sources(level: Level) -> list[Path]:
    sources = sorted(Path(__file__).parent.glob("*.cpp"))
    return [source for source in sources if level.trains or source.stem not in OF_TRAINING]


@cache
def _file() -> Path:
    """Where the compiled kernels lie or will lie."""
    level = _level()
    assert level is not None
    digest = hashlib.sha256("\n".join((torch.__version__, *FLAGS, *level.flags)).encode())
    for source in sorted(Path(__file__).parent.glob("*.[ch]*")):
        digest.update(source.read_bytes())
    root = os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions"
    return Path(root) / f"seqray-{digest.hexdigest()[:16]}" / "kernels.so"


@cache
def _load() -> Any | None:
    level = _level()
    assert level is not None
    try:
        if not _file().exists():
            _build(_file(), level)
        torch.ops.load_library(_file())  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError, SubprocessError) as error:
        log.warning("CPU kernels are not at hand, the work goes on without them and slower: %s", error)
        return None
    return torch.ops.seqray


def _build(file: Path, level: Level) -> None:
    """Compiles the kernels into `file`; of several processes one does it and the others wait."""
    compiler = _compiler()
    file.parent.mkdir(parents=True, exist_ok=True)
    with (file.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it ends
        if file.exists():
            return
        log.info("compiling the CPU kernels into %s", file)
        with tempfile.TemporaryDirectory(dir=file.parent) as folder:
            _compile(compiler, level, Path(folder), Path(folder) / file.name)
            (Path(folder) / file.name).replace(file)


def _compiler() -> list[str]:
    wanted = shlex.split(os.environ.get("CXX", ""))
    found = wanted or [path for path in map(shutil.which, COMPILERS) if path][:1]
    if not found:
        raise OSError(f"no C++ compiler among {', '.join(COMPILERS)}; CXX names another")
    return found


def _compile(compiler: list[str], level: Level, folder: Path, product: Path) -> None:
    torch_folder = Path(torch.__file__).parent
    include = torch_folder / "include"
    places = (f"-I{include}", f"-I{include / 'torch' / 'csrc' / 'api' / 'include'}")
    sources = _sources(level)
    objects = [str(folder / f"{source.stem}.o") for source in sources]
    _run([
        [*compiler, *FLAGS, *level.flags, *places, "-c", str(source), "-o", into]
        for source, into in zip(sources, objects, strict=True)
    ])  # fmt: skip
    # OpenMP is not named here: its functions are then those that PyTorch itself brings along.
    linked = (f"-L{torch_folder / 'lib'}", "-ltorch_cpu", "-lc10", "-o", str(product))
    _run([[*compiler, "-shared", *objects, *linked]])


def _run(commands: list[list[str]]) -> None:
    """Runs the commands at the same time; OSError with the first line that names an error."""
    with ExitStack() as ending:
        running = [ending.enter_context(Popen(command, stderr=PIPE, text=True)) for command in commands]
        for process in running:
            ending.callback(process.kill)
        said = [process.communicate(timeout=SECONDS)[1].splitlines() for process in running]
    for process, lines in zip(running, said, strict=True):
        if process.returncode:
            wrong = [line for line in lines if "error" in line]
            raise OSError(f"the C++ compiler failed: {(wrong or lines or ['without a word'])[0]}")
