import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("seqray", "train", "tune", "serve", "demo")
MAY_IMPORT = {
    "seqray": {"seqray"},
    "train": {"train", "seqray"},
    "tune": {"tune", "train", "seqray"},
    "serve": {"serve", "seqray"},
    "demo": {"demo", "seqray"},
}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the floor"
            names.add(str(node.module).split(".")[0])
    return names


def loaded_by(code: str, *names: str) -> set[str]:
    """Which of `names` are in sys.modules after `code` ran in a fresh interpreter."""
    script = f"import sys\n{code}\nprint(*sorted({set(names)!r} & set(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def project_files() -> list[Path]:
    folders = (*OURS, "tests", "benchmarks", "configs", ".ci")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return [path for path in (*files, *ROOT.glob("*"), ROOT / ".rayignore") if path.is_file()]


@pytest.mark.parametrize("package", OURS)
def test_imports_only_point_down(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    upward = {str(path): imported(path) & (set(OURS) - MAY_IMPORT[package]) for path in files}
    assert {path: names for path, names in upward.items() if names} == {}


def test_the_library_never_imports_ray() -> None:
    assert [str(path) for path in (ROOT / "seqray").rglob("*.py") if "ray" in imported(path)] == []


def test_nothing_imports_the_tests_or_the_benchmarks() -> None:
    files = [path for package in OURS for path in (ROOT / package).rglob("*.py")]
    assert [str(path) for path in files if imported(path) & {"tests", "benchmarks"}] == []


def test_every_module_of_the_library_stays_without_ray_when_imported() -> None:
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "seqray").rglob("*.py")]
    code = "\n".join(f"import {'.'.join(module.parts).removesuffix('.__init__')}" for module in modules)
    assert loaded_by(code, "ray", "wandb", "matplotlib.pyplot", "train", "serve") == set()


def test_the_config_is_light() -> None:
    code = "from seqray.config import load_config\nload_config('configs/demo.yaml')\nimport seqray.command"
    assert loaded_by(code, "torch", "ray", "wandb", "pyarrow", "numpy", "transformers", "matplotlib") == set()


@pytest.mark.parametrize(
    "command", ["train", "train.prepare", "train.evaluate", "tune", "serve", "serve.compact", "serve.batch"]
)
def test_a_dry_run_imports_neither_torch_nor_ray(command: str) -> None:
    code = (
        f"import runpy\nsys.argv = ['x', 'configs/demo.yaml', '--dry-run']\n"
        f"try:\n    runpy.run_module({command!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n    assert stop.code in (0, None), stop.code"
    )
    assert loaded_by(code, "torch", "ray", "wandb") == set()


def test_importing_a_program_does_nothing() -> None:
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in ("train", "tune", "serve", "demo")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "__init__.py"
    ]
    code = "import logging, os, threading\nbefore = dict(os.environ), os.getcwd(), logging.getLogger().level\n"
    code += "\n".join(f"import {module}" for module in modules)
    code += "\nimport ray\nassert not ray.is_initialized()"
    code += "\nassert (os.getcwd(), logging.getLogger().level) == before[1:]"
    assert loaded_by(code, "train") == {"train"}


def test_the_wheel_ships_the_library_only() -> None:
    from setuptools import find_packages

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    include = project["tool"]["setuptools"]["packages"]["find"]["include"]
    found = find_packages(str(ROOT), include=include)
    assert "seqray" in found
    assert {name.split(".")[0] for name in found} == {"seqray"}


def test_every_dependency_is_pinned_exactly() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][A-Za-z0-9.]*", pin)] == []
    assert pins == sorted(pins, key=str.lower)
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    assert {re.split(r"[\[<>=!;]", name)[0].lower() for name in wanted} <= names


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    machine = re.compile(r"/home/\w+/|/root/|/Users/\w+/|(?<![\w.])/work/")
    this = Path(__file__).resolve()
    found = []
    for path in project_files():
        if path.suffix not in (".png", ".parquet", ".arrow", ".safetensors") and path != this:
            found += [f"{path}: {hit}" for hit in machine.findall(path.read_text(encoding="utf-8", errors="replace"))]
    assert found == []


def test_ci_is_make_check_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make check test"
