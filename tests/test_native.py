"""How the kernels in C++ come to be, and that everything works without them."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernels import needs_kernels, needs_kernels_of_training

from seqray.models.dropout import Dropout
from seqray.models.stream import Stream
from seqray.native import library
from seqray.native.library import operators

LENGTHS = torch.tensor([3, 150, 1, 4, 8, 8, 2, 33, 32, 31, 128, 200])
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("compiler", ["false", "no-such-compiler-anywhere"])
def test_without_a_compiler_training_goes_on(
    compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setattr(library, "_level", lambda: library.AVX512)
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "made" / "kernels.so")
    library._load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert operators(build=True) is None
                mixed_TD = Stream(LENGTHS).attend(
                    torch.randn(int(LENGTHS.sum()), 6, requires_grad=True), 1, Dropout(0.0)
                )
                mixed_TD.sum().backward()
    finally:
        library._load.cache_clear()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "the work goes on without them" in caplog.text
    assert {path.name for path in (tmp_path / "made").iterdir()} == {"lock"}


@needs_kernels
def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    script = "import torch; from seqray.native.library import operators; assert operators(build=True) is not None"
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=environment) for _ in range(3)]
    assert [process.wait(timeout=200) for process in running] == [0, 0, 0]
    (folder,) = tmp_path.iterdir()
    assert {path.name for path in folder.iterdir()} == {"lock", "kernels.so"}


@needs_kernels_of_training  # where they cannot run, AVX2 is what all tests are about
def test_to_serve_avx2_is_enough() -> None:
    tests = [f"tests/test_{name}.py" for name in ("native_top_items", "native_transformer", "one_call")]
    environment = {**os.environ, "SEQRAY_NATIVE": "avx2"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    said = subprocess.run(
        command, check=True, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=300
    )
    assert "skipped" not in said.stdout


def test_nothing_is_built_before_something_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_file", lambda: tmp_path / "made" / "kernels.so")
    with torch.no_grad():
        Stream(LENGTHS).attend(torch.randn(int(LENGTHS.sum()), 6, requires_grad=True), 1, Dropout(0.0))
    Stream(LENGTHS).attend(torch.randn(int(LENGTHS.sum()), 6), 1, Dropout(0.0))
    assert list(tmp_path.iterdir()) == []
