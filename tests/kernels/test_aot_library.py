"""Which launches may take machine code from a library, and what is said of a file that is none. No GPU, no library."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coars_kernels.aot_library import Library, LibraryKernel, Request, find, install

REQUEST = Request(
    module="coars_kernels.linear_logprob.triton_rows",
    function="row_masses_kernel",
    source="a hash",
    arch=90,
    signature={"logits": "*fp32", "vocab_size": "i32"},
    constants={"mass": None, "BLOCK": 2048, "LARGEST_FIRST": False},
    divisible=frozenset({"logits", "vocab_size"}),
    options={"num_warps": 8, "num_stages": 3},
    triton_version="3.6.0",
)


def kernel_of(request: Request, **changes: Any) -> LibraryKernel:
    """The library's kernel that serves exactly this request, with some of its facts changed."""
    facts = {
        "module": request.module,
        "source": request.source,
        "signature": request.signature,
        "constants": request.constants,
        "divisible": sorted(request.divisible),
        "triton_version": request.triton_version,
        "metadata": request.options,
    } | changes
    figures = {"num_warps": 8, "shared_bytes": 0, "registers": 32, "local_bytes": 0}
    return LibraryKernel(
        name="rows", function=request.function, arch=90, cubin=b"", triton_text=json.dumps(facts), **figures
    )


def test_the_same_kernel_is_taken() -> None:
    kernel = kernel_of(REQUEST)
    assert find([kernel], REQUEST) == (kernel, "")


def test_fewer_alignments_are_right_and_more_are_not() -> None:
    less, more = kernel_of(REQUEST, divisible=["logits"]), kernel_of(REQUEST)
    assert find([less], REQUEST)[0] is less
    assert find([less, more], REQUEST)[0] is more
    odd = replace(REQUEST, divisible=frozenset({"logits"}))
    assert find([less, more], odd)[0] is less
    assert find([more], odd) == (None, "not a multiple of 16, as the library's kernel needs: vocab_size")


@pytest.mark.parametrize(
    ("request_change", "reason"),
    [
        ({"function": "other_kernel"}, "no such kernel"),
        ({"triton_version": "3.7.0"}, "another Triton than 3.7.0"),
        ({"source": "edited"}, "another version of its source"),
        ({"arch": 100}, "not built for sm_100"),
        ({"signature": {"logits": "*fp32", "vocab_size": "i64"}}, "no such argument types and constants"),
        ({"constants": {"mass": None, "BLOCK": 1024, "LARGEST_FIRST": False}}, "no such argument types and constants"),
        ({"constants": {"mass": None, "BLOCK": 2048, "LARGEST_FIRST": 0}}, "no such argument types and constants"),
        (
            {"options": {"num_warps": 4, "num_stages": 2}},
            "other compiler options in the library: num_stages, num_warps",
        ),
    ],
)
def test_anything_else_is_refused_with_the_reason(request_change: dict[str, Any], reason: str) -> None:
    kernel, said = find([kernel_of(REQUEST)], replace(REQUEST, **request_change))
    assert kernel is None and reason in said


def test_a_file_that_is_no_library(tmp_path: Path) -> None:
    missing = tmp_path / "libcoars_kernels.so"
    with pytest.raises(ValueError, match=rf"COARS_KERNELS_AOT: {missing}: no such file"):
        Library(missing)
    missing.write_bytes(b"not a library")
    with pytest.raises(ValueError, match=rf"COARS_KERNELS_AOT: {missing}: cannot be used as libcoars_kernels.so"):
        Library(missing)


def test_install(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("COARS_KERNELS_AOT", raising=False)
    assert not install()
    monkeypatch.setenv("COARS_KERNELS_AOT", "/nowhere/libcoars_kernels.so")
    with pytest.raises(ValueError, match="COARS_KERNELS_AOT: /nowhere/libcoars_kernels.so: no such file"):
        install()


def test_a_library_of_another_interface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libcoars_kernels.so"
    path.touch()
    loaded = SimpleNamespace(coars_kernels_abi=lambda: 99, coars_kernels_count=None, coars_kernels_get=None)
    monkeypatch.setattr("coars_kernels.aot_library.ctypes.CDLL", lambda name: loaded)
    with pytest.raises(ValueError, match="has interface 99, this coars_kernels reads 1"):
        Library(path)
