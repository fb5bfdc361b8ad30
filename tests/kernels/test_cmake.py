"""The ahead-of-time library, built by CMake as a user would: its own tests, what is missing said in one line, and that
launches by Triton take their machine code from it. Without a GPU nothing is run; see tests/kernels/aot_launches.py.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("cmake") is None or shutil.which("cc") is None, reason="needs CMake and a compiler"
    ),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton"),
]
ROOT = Path(__file__).parents[2]
ARCH = 90


def run(*command: object, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    texts = [str(part) for part in command]
    return subprocess.run(texts, capture_output=True, text=True, env={**os.environ, **(environment or {})}, cwd=ROOT)


def configure(build: Path, *options: str, python: object = sys.executable, **environment: str):
    return run("cmake", "-S", ROOT, "-B", build, f"-DCOARS_PYTHON={python}", *options, environment=environment)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A build folder with the library for one GPU."""
    folder = tmp_path_factory.mktemp("build")
    for step in (configure(folder, f"-DCOARS_ARCHS={ARCH}"), run("cmake", "--build", folder)):
        assert step.returncode == 0, step.stdout + step.stderr
    return folder


def test_ctest(build: Path) -> None:
    tests = run("ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error")
    assert tests.returncode == 0, tests.stdout


def test_a_second_build_compiles_nothing(build: Path) -> None:
    library = build / "libcoars_kernels.so"
    before = library.stat().st_mtime_ns
    assert "Compiling" not in run("cmake", "--build", build).stdout
    assert library.stat().st_mtime_ns == before


def test_needs_no_python_and_no_cuda(build: Path) -> None:
    needed = run("readelf", "--dynamic", build / "libcoars_kernels.so").stdout
    assert "NEEDED" in needed and "python" not in needed and "cuda" not in needed


def test_stored_results_are_those_of_the_references() -> None:
    path = ROOT / "kernels/aot/example/make_expected.py"
    spec = importlib.util.spec_from_file_location("make_expected", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def numbers(text: str) -> list[float]:
        return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text)]

    stored = numbers(path.with_name("expected.h").read_text())
    assert len(stored) > 340
    assert numbers(module.text()) == pytest.approx(stored, rel=1e-9, abs=1e-12)


def test_launches_take_every_kernel_of_the_trainer_from_the_library(build: Path, tmp_path: Path) -> None:
    program = ROOT / "tests/kernels/aot_launches.py"
    reports = []
    for index, library in enumerate(([build / "libcoars_kernels.so"], [])):
        environment = {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path / str(index))}
        done = run(sys.executable, program, ARCH, *library, environment=environment)
        assert done.returncode == 0, done.stderr
        reports.append(json.loads(done.stdout))
    taken, compiled = reports
    print(f"{taken['taken']} kernels: {taken['seconds']:.2f} s from the library, {compiled['seconds']:.2f} s compiled")
    assert taken["launched"] == compiled["launched"]
    assert taken["taken"] > 20 and taken["compiled"] == 0
    assert taken["seconds"] < compiled["seconds"] / 5


def test_what_the_library_lacks_is_compiled_and_logged(build: Path, tmp_path: Path) -> None:
    program = ROOT / "tests/kernels/aot_launches.py"
    environment = {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_CACHE_DIR": str(tmp_path)}
    done = run(sys.executable, program, 80, build / "libcoars_kernels.so", environment=environment)
    assert done.returncode == 0 and json.loads(done.stdout)["taken"] == 0
    assert "row_masses_kernel for sm_80 is compiled now: the library was not built for sm_80" in done.stderr


def one_message(result: subprocess.CompletedProcess[str]) -> str:
    """CMake's only error, its line breaks undone."""
    assert result.returncode != 0 and result.stderr.count("CMake Error") == 1, result.stderr
    return " ".join(result.stderr.split())


def test_python_without_torch(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    message = one_message(configure(tmp_path / "build", python=bare))
    assert "cannot import torch and triton (ModuleNotFoundError: No module named 'torch')" in message
    assert "-m pip install torch triton" in message and "-DCOARS_PYTHON=" in message


def test_no_compiler(tmp_path: Path) -> None:
    message = one_message(configure(tmp_path / "build", CC="/nowhere/cc", CXX="/nowhere/c++"))
    assert "coars_kernels: no C compiler found; install gcc and g++ (or clang)" in message


def test_unknown_gpu(tmp_path: Path) -> None:
    message = one_message(configure(tmp_path / "build", "-DCOARS_ARCHS=80;75"))
    assert "COARS_ARCHS: '75' is none of 80, 86, 89, 90, 100, 120" in message
