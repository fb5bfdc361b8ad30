"""What this machine has, which way every operation would go here, and why.

    python -m coars_kernels.env_report
    python -m coars_kernels.env_report --json

Nothing is measured and nothing is compiled: an operation's way is asked of the same functions that choose it when it
is called. What cannot be read is shown as "-" with the reason, and never ends the report.

What is left out: the ways of one call that depend on its arguments (float64 log-probs, a `path` that the caller names).
"""

import argparse
import ctypes
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from coars_kernels.agent_lora.op import LARGEST_ROWS
from coars_kernels.aot_library import VARIABLE, Library
from coars_kernels.dispatch import has_triton
from coars_kernels.linear_logprob.sweep import choose_path

OPTIONAL_PACKAGES = {
    "triton": "kernels on a GPU",
    "transformers": "the trainer's models",
    "peft": "adapters, in tests",
    "pytest-benchmark": "benches",
    "liger-kernel": "rival",
    "cut-cross-entropy": "rival",
    "quack-kernels": "rival",
    "flash-linear-attention": "rival",
    "trl": "rival",
    "flash-attn": "rival",
}


@dataclass(frozen=True)
class Entry:
    """One line of the report; `value` is None where it could not be read, and `note` then says why."""

    section: str
    name: str
    value: str | None
    note: str = ""


def _read(section: str, name: str, read: Callable[[], Any]) -> Entry:
    """An entry from `read`, which returns a value or (value, note)."""
    try:
        answer = read()
    # A report on a broken machine must get past whatever is broken, and say what it was.
    except Exception as error:
        message = " ".join(str(error).split())
        return Entry(section, name, None, f"{type(error).__name__}: {message}" if message else type(error).__name__)
    value, note = answer if isinstance(answer, tuple) else (answer, "")
    return Entry(section, name, None if value is None else str(value), note)


def _version(package: str, purpose: str) -> tuple[str | None, str]:
    try:
        return importlib.metadata.version(package), purpose
    except importlib.metadata.PackageNotFoundError:
        return None, f"not installed ({purpose})"


def _cuda_runtime() -> tuple[str | None, str]:
    return (
        (torch.version.cuda, "") if torch.version.cuda else (None, f"torch {torch.__version__} is built without CUDA")
    )


def _cuda_driver() -> tuple[str, str]:
    version = ctypes.c_int()
    status = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    if status:
        raise RuntimeError(f"cuDriverGetVersion returned {status}")
    return f"{version.value // 1000}.{version.value % 1000 // 10}", "newest CUDA that it serves"


def versions() -> list[Entry]:
    """Python, torch, Triton, CUDA, and this package."""

    def package() -> str:
        import coars_kernels

        return coars_kernels.__version__

    readers: dict[str, Callable[[], Any]] = {
        "coars_kernels": package,
        "python": lambda: (platform.python_version(), sys.executable),
        "platform": lambda: (platform.machine(), platform.platform()),
        "torch": lambda: torch.__version__,
        "triton": lambda: _version("triton", "kernels on a GPU"),
        "CUDA runtime": _cuda_runtime,
        "CUDA driver": _cuda_driver,
    }
    return [_read("versions", name, read) for name, read in readers.items()]


def devices() -> list[Entry]:
    """The processor's threads, and every CUDA device."""

    def processor() -> tuple[str, str]:
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        threads = os.environ.get("OMP_NUM_THREADS")
        return (
            f"{usable} cores",
            f"torch uses {torch.get_num_threads()} threads; OMP_NUM_THREADS={threads or 'not set'}",
        )

    def device(index: int) -> tuple[str, str]:
        found = torch.cuda.get_device_properties(index)
        figures = (
            f"sm_{found.major}{found.minor}",
            f"{found.total_memory / 2**30:.1f} GiB",
            f"{found.multi_processor_count} multiprocessors",
        )
        return found.name, ", ".join(figures)

    entries = [_read("devices", "cpu", processor)]
    count = _read("devices", "cuda", torch.cuda.device_count)
    number = int(count.value or 0)
    if count.value is None or not torch.cuda.is_available():
        return [*entries, Entry("devices", "cuda", None, count.note or _no_cuda())]
    return [
        *entries,
        *(_read("devices", f"cuda:{index}", lambda index=index: device(index)) for index in range(number)),
    ]


def _no_cuda() -> str:
    if torch.version.cuda is None:
        return "no CUDA device: this torch is built without CUDA"
    return "no CUDA device: torch.cuda.is_available() is false"


def _head(operation: str) -> tuple[str, str]:
    """The way of an operation on the head, for every dtype; they agree unless a fused product was measured faster."""
    if not torch.cuda.is_available():
        return "plain torch", f"{_no_cuda()}; {operation} by chunks of rows"
    weight = torch.empty(16, 16, device="cuda", dtype=torch.bfloat16)
    if not has_triton(weight):
        return "plain torch", "Triton is not installed; library product, then torch on the chunk's logits"
    ways = {dtype: choose_path(weight.to(dtype), "auto") for dtype in (torch.bfloat16, torch.float16, torch.float32)}
    reasons = {
        "library": "the library's product, then a row kernel: no measurement says that the fused one is faster here",
        "fused": "one product that keeps no logits, measured to be faster here (FUSED_IS_FASTER)",
    }
    value = "Triton, path " + "; ".join(
        f"{way} ({', '.join(str(dtype).removeprefix('torch.') for dtype in ways if ways[dtype] == way)})"
        for way in dict.fromkeys(ways.values())
    )
    return value, "; ".join(reasons[way] for way in dict.fromkeys(ways.values()))


def _kernels(on_gpu: str, elsewhere: str) -> tuple[str, str]:
    """The way of an operation whose kernels run wherever Triton does."""
    if not torch.cuda.is_available():
        return "plain torch", f"{_no_cuda()}; {elsewhere}"
    if not has_triton(torch.empty(1, device="cuda")):
        return "plain torch", f"Triton is not installed; {elsewhere}"
    return "Triton", on_gpu


def _everywhere_torch(reason: str) -> tuple[str, str]:
    return "plain torch", reason


def _credit() -> tuple[str, str]:
    kernels = "three or four small kernels; float64 log-probs take plain torch"
    return _kernels(kernels, "blocks of turns that stay in the cache")


def _both() -> tuple[str, str]:
    return f"{_head('the head')[0]} + {_credit()[0]}", "paired_linear_logprob, then credit_policy_loss"


PAGES = "pages gathered, then scaled_dot_product_attention"
OPERATIONS: dict[str, Callable[[], tuple[str, str]]] = {
    "linear_logprob": lambda: _head("the head"),
    "paired_linear_logprob": lambda: _head("student and teacher"),
    "credit_policy_loss": _credit,
    "fused_credit_loss": _both,
    "fused_linear_divergence": lambda: _everywhere_torch("on every device: products of the library by chunks of rows"),
    "sample_with_logprob": lambda: _kernels(
        "two launches that read the logits once", "noise by counter and an argmax, in blocks of rows"
    ),
    "paged_decode_attention": lambda: _kernels(
        "one to three launches, with splits merged by log-sum-exp; keys stay in their pages", PAGES
    ),
    "paged_prefill_attention": lambda: _kernels("one launch; keys stay in their pages", PAGES),
    "branch_attention": lambda: _kernels(
        "one launch; the trunk's keys stay where they are; float64 takes plain torch",
        "a call of scaled_dot_product_attention per branch",
    ),
    "agent_lora": lambda: _kernels(
        f"two launches for up to {LARGEST_ROWS} rows without gradients, else two dense products of the library",
        "two dense products of the library",
    ),
}


def _library() -> tuple[str | None, str]:
    path = os.environ.get(VARIABLE)
    if not path:
        return None, f"{VARIABLE} is not set: Triton compiles each kernel when it is first launched"
    library = Library(path)
    archs = ", ".join(f"sm_{arch}" for arch in sorted({kernel.arch for kernel in library.kernels}))
    built_by = ", ".join(sorted({kernel.triton["triton_version"] for kernel in library.kernels}))
    facts = f"{len(library.kernels)} kernels for {archs}, built by Triton {built_by}"
    if not torch.cuda.is_available():
        return path, f"{facts}; not used: {_no_cuda()}"
    installed = importlib.metadata.version("triton")
    if installed != built_by:
        return path, f"{facts}; not used: Triton {installed} is installed, which compiles its own"
    return path, f"{facts}; what it does not have is compiled, and the log says why"


def operations() -> list[Entry]:
    """The way that every operation would take on this machine's first device, and the ahead-of-time library."""
    entries = [_read("operations", name, way) for name, way in OPERATIONS.items()]
    return [*entries, _read("operations", "ahead-of-time library", _library)]


def packages() -> list[Entry]:
    """Packages that are used where they are installed."""
    return [
        _read("optional packages", name, lambda name=name, purpose=purpose: _version(name, purpose))
        for name, purpose in OPTIONAL_PACKAGES.items()
    ]


def collect() -> list[Entry]:
    """The whole report."""
    return [*versions(), *devices(), *operations(), *packages()]


def as_table(entries: list[Entry]) -> str:
    """One table for reading, a heading for each section."""
    wide = max(len(entry.name) for entry in entries)
    values = max(len(entry.value or "-") for entry in entries if len(entry.value or "") <= 40)
    lines, section = [], None
    for entry in entries:
        if entry.section != section:
            lines += ["", entry.section] if lines else [entry.section]
            section = entry.section
        lines.append(f"  {entry.name:<{wide}}  {entry.value or '-':<{values}}  {entry.note}".rstrip())
    return "\n".join(lines)


def as_json(entries: list[Entry]) -> str:
    """{section: {name: {"value": ..., "note": ...}}}"""
    sections: dict[str, dict[str, dict[str, Any]]] = {}
    for entry in entries:
        fields = asdict(entry)
        sections.setdefault(fields.pop("section"), {})[fields.pop("name")] = fields
    return json.dumps(sections, indent=2)


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(
        prog="python -m coars_kernels.env_report", description="What is here, and which way each op goes."
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    entries = collect()
    print(as_json(entries) if parser.parse_args(arguments).json else as_table(entries))


if __name__ == "__main__":
    main()
