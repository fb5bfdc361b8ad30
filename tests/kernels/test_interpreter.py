"""Runs `interpret/`, the tests of the Triton kernels on CPU tensors, in a process of their own (see its conftest)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton", reason="needs Triton, whose interpreter runs the kernels without a GPU")
    # the kernels divide by zero and multiply infinities in lanes that they then leave out; numpy warns of it
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore::RuntimeWarning", "tests/kernels/interpret"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    inner = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if inner.returncode:
        pytest.fail(f"{' '.join(command[2:])} failed:\n{inner.stdout}{inner.stderr}", pytrace=False)
