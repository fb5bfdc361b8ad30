"""The report on this machine: it runs as a module, knows every operation, and gets past what is broken."""

import inspect
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import coars_kernels
from coars_kernels import env_report

NOT_OPERATIONS = {"checked_values"}


def test_runs_as_a_module() -> None:
    command = [sys.executable, "-m", "coars_kernels.env_report"]
    table = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert table.returncode == 0, table.stderr
    assert "linear_logprob" in table.stdout and torch.__version__ in table.stdout
    report = subprocess.run([*command, "--json"], capture_output=True, text=True, env=_environment())
    sections = json.loads(report.stdout)
    assert list(sections) == ["versions", "devices", "operations", "optional packages"]
    assert sections["versions"]["torch"]["value"] == torch.__version__


def _environment() -> dict[str, str]:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path}


def test_every_operation_is_reported() -> None:
    public = {name for name in coars_kernels.__all__ if inspect.isfunction(getattr(coars_kernels, name))}
    assert set(env_report.OPERATIONS) == public - NOT_OPERATIONS


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_every_way_is_plain_torch_and_says_why() -> None:
    for entry in env_report.operations()[:-1]:
        assert entry.value is not None and set(entry.value.split(" + ")) == {"plain torch"} and entry.note
    cuda = next(entry for entry in env_report.devices() if entry.name == "cuda")
    assert cuda.value is None and "no CUDA device" in cuda.note


def test_gpu_with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, triton=True)
    report = {entry.name: entry for entry in env_report.operations()}
    assert report["linear_logprob"].value == "Triton, path library (bfloat16, float16, float32)"
    assert report["credit_policy_loss"].value == "Triton"
    assert report["agent_lora"].value == report["sample_with_logprob"].value == "Triton"
    assert "up to 128 rows without gradients" in report["agent_lora"].note
    fused_bf16 = lambda weight, path: "fused" if weight.dtype == torch.bfloat16 else "library"  # noqa: E731
    monkeypatch.setattr(env_report, "choose_path", fused_bf16)
    entry = {entry.name: entry for entry in env_report.operations()}["linear_logprob"]
    assert entry.value == "Triton, path fused (bfloat16); library (float16, float32)"
    assert "FUSED_IS_FASTER" in entry.note


def test_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_gpu(monkeypatch, triton=False)
    report = {entry.name: entry for entry in env_report.operations()}
    for name in ("linear_logprob", "credit_policy_loss"):
        assert report[name].value == "plain torch" and "Triton is not installed" in report[name].note


def _pretend_gpu(monkeypatch: pytest.MonkeyPatch, *, triton: bool) -> None:
    """Tensors stay on the CPU; only the questions that the report asks get a GPU's answers."""

    def empty_on_cpu(*shape: int, device: str, **options: object) -> torch.Tensor:
        return torch.zeros(*shape, **options)

    available = SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(
        env_report, "torch", SimpleNamespace(**{**vars(torch), "cuda": available, "empty": empty_on_cpu})
    )
    monkeypatch.setattr(env_report, "has_triton", lambda tensor: triton)


def test_a_library_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COARS_KERNELS_AOT", "/nowhere/libcoars_kernels.so")
    entry = env_report.operations()[-1]
    assert entry.value is None
    assert entry.note.startswith("ValueError: COARS_KERNELS_AOT: /nowhere/libcoars_kernels.so: no such file")


def test_what_cannot_be_read_is_shown_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise OSError("the device\nfell off the bus")

    monkeypatch.setattr(env_report, "choose_path", broken)
    monkeypatch.setattr(env_report.ctypes, "CDLL", broken)
    monkeypatch.setattr(env_report.torch.cuda, "device_count", broken)
    entries = env_report.collect()
    driver = next(entry for entry in entries if entry.name == "CUDA driver")
    assert driver.value is None and driver.note == "OSError: the device fell off the bus"
    assert next(entry for entry in entries if entry.name == "cuda").note == "OSError: the device fell off the bus"
    assert "fell off the bus" in env_report.as_table(entries) and json.loads(env_report.as_json(entries))
