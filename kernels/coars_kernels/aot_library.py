"""Triton launches that take machine code from `libcoars_kernels.so` instead of compiling it.

    COARS_KERNELS_AOT=/path/libcoars_kernels.so python train.py

`install()` stands in front of the function by which Triton compiles a kernel at its first launch. For a kernel of this
package it looks for machine code in the library that was made of the same source by the same Triton with the same
options, types and constants, and that relies on no alignment which the launch does not have; everything else of the
launch stays Triton's. What the library does not have is compiled as ever, and one line of the log says which kernel and
why. Machine code that relies on fewer alignments than a launch has is right, and taken.

What is left out: what Triton compiles besides, a small launcher in C for each list of argument types, which it keeps
in its cache; and Triton's variables for debugging its compiler, which do not reach machine code that is already there.
"""

import ctypes
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

VARIABLE = "COARS_KERNELS_AOT"
ABI = 1
PACKAGE = __name__.partition(".")[0]
# Of what Triton keeps beside machine code: what is no option, and options that the Triton version decides.
NOT_COMPARED = {"extern_libs", "hash"}
log = logging.getLogger(__name__)


class _Info(ctypes.Structure):
    """`coars_kernel_info` of coars_kernels.h."""

    _fields_ = [
        *((name, ctypes.c_char_p) for name in ("name", "function")),
        *(
            (name, ctypes.c_int)
            for name in ("arch", "num_warps", "shared_bytes", "registers", "local_bytes", "num_arguments")
        ),
        *((name, ctypes.c_char_p) for name in ("arguments", "constants", "triton")),
        ("cubin", ctypes.c_void_p),
        ("cubin_bytes", ctypes.c_size_t),
    ]


@dataclass(frozen=True)
class LibraryKernel:
    """One row of the library's table."""

    name: str
    function: str
    arch: int
    num_warps: int
    shared_bytes: int
    registers: int
    local_bytes: int
    cubin: bytes
    triton_text: str

    @cached_property
    def triton(self) -> dict[str, Any]:
        """Source, signature, constants, alignments and options, as `aot.build` wrote them."""
        return json.loads(self.triton_text)


class Library:
    """The kernels of a library file. Opening it needs no GPU and no CUDA driver.

    Raises:
        ValueError: the file cannot be read, or is no such library; the message names `COARS_KERNELS_AOT` and the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"{VARIABLE}: {path}: no such file; build it as docs/aot.md says, or unset {VARIABLE}")
        try:
            library = ctypes.CDLL(str(self.path.resolve()))
            abi, count, get = library.coars_kernels_abi, library.coars_kernels_count, library.coars_kernels_get
        except (OSError, AttributeError) as error:
            raise ValueError(f"{VARIABLE}: {path}: cannot be used as libcoars_kernels.so: {error}") from error
        if abi() != ABI:
            message = f"has interface {abi()}, this coars_kernels reads {ABI}; build it again"
            raise ValueError(f"{VARIABLE}: {path}: {message}")
        get.restype = ctypes.POINTER(_Info)
        self.kernels = [_read(get(index).contents) for index in range(count())]


def _read(info: _Info) -> LibraryKernel:
    return LibraryKernel(
        name=info.name.decode(),
        function=info.function.decode(),
        arch=info.arch,
        num_warps=info.num_warps,
        shared_bytes=info.shared_bytes,
        registers=info.registers,
        local_bytes=info.local_bytes,
        cubin=ctypes.string_at(info.cubin, info.cubin_bytes),
        triton_text=info.triton.decode(),
    )


@dataclass(frozen=True)
class Request:
    """What one launch asks of Triton's compiler, in the library's words."""

    module: str
    function: str
    source: str
    arch: int
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    divisible: frozenset[str]
    options: Mapping[str, Any]
    triton_version: str


def find(kernels: list[LibraryKernel], request: Request) -> tuple[LibraryKernel | None, str]:
    """The kernel that serves a request, the one with the most alignments if several do; else None and the reason."""
    found = [k for k in kernels if k.function == request.function and k.triton["module"] == request.module]
    if not found:
        return None, "the library has no such kernel"
    found = [k for k in found if k.triton["triton_version"] == request.triton_version]
    if not found:
        return None, f"the library was built with another Triton than {request.triton_version}"
    found = [k for k in found if k.triton["source"] == request.source]
    if not found:
        return None, "the library was built from another version of its source"
    # Exactly this one: a launch by Triton has no notion of machine code for a smaller GPU.
    found = [k for k in found if k.arch == request.arch]
    if not found:
        return None, f"the library was not built for sm_{request.arch}"
    found = [k for k in found if k.triton["signature"] == request.signature]
    found = [k for k in found if _same(k.triton["constants"], request.constants)]
    if not found:
        return None, "no such argument types and constants in the library"
    different = {name for k in found for name in _different_options(k, request.options)}
    found = [k for k in found if not _different_options(k, request.options)]
    if not found:
        return None, f"other compiler options in the library: {', '.join(sorted(different))}"
    lacking = {name for k in found for name in set(k.triton["divisible"]) - request.divisible}
    found = [k for k in found if request.divisible.issuperset(k.triton["divisible"])]
    if not found:
        return None, f"not a multiple of 16, as the library's kernel needs: {', '.join(sorted(lacking))}"
    return max(found, key=lambda k: len(k.triton["divisible"])), ""


def _same(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Equal in type too: True is not 1."""
    return {name: repr(value) for name, value in ours.items()} == {name: repr(value) for name, value in theirs.items()}


def _different_options(kernel: LibraryKernel, options: Mapping[str, Any]) -> set[str]:
    ours = kernel.triton["metadata"]
    return {name for name, value in options.items() if name not in NOT_COMPARED and ours.get(name) != value}


def request_of(source: Any, target: Any, options: Mapping[str, Any] | None) -> Request:
    """The request in the arguments of Triton's `compile`."""
    import triton
    from triton.compiler import make_backend

    function, names = source.fn, source.fn.arg_names
    constants = {names[place[0]]: value for place, value in source.constants.items()}
    parsed = make_backend(target).parse_options(dict(options or {}, **source.parse_options()))
    return Request(
        module=function.module,
        function=function.__name__,
        source=function.cache_key,
        arch=target.arch,
        signature={name: kind for name, kind in source.signature.items() if kind != "constexpr"},
        constants=constants,
        divisible=frozenset(
            names[place[0]] for place, attributes in source.attrs.items() if ["tt.divisibility", 16] in attributes
        ),
        options=json.loads(json.dumps(vars(parsed), default=str)),  # tuples become lists, as in the library
        triton_version=triton.__version__,
    )


class _Loader:
    """Stands in front of Triton's `compile`."""

    def __init__(self, library: Library, compile_by_triton: Any):
        self.library, self.compile_by_triton = library, compile_by_triton
        self.num_taken = self.num_compiled = 0

    def __call__(self, src: Any, target: Any = None, options: Any = None, **others: Any) -> Any:
        """Triton's `compile`."""
        module = getattr(getattr(src, "fn", None), "module", "")
        if target is None or module.partition(".")[0] != PACKAGE:
            return self.compile_by_triton(src, target=target, options=options, **others)
        kernel, reason = find(self.library.kernels, request_of(src, target, options))
        if kernel is None:
            self.num_compiled += 1
            log.warning("%s for sm_%s is compiled now: %s (%s)", src.name, target.arch, reason, self.library.path)
            return self.compile_by_triton(src, target=target, options=options, **others)
        self.num_taken += 1
        return self.take(kernel, src, target)

    @staticmethod
    def take(kernel: LibraryKernel, src: Any, target: Any) -> Any:
        """Machine code as the object that Triton makes of an entry of its cache: a JSON file and a cubin."""
        from triton.compiler import CompiledKernel

        key = f"{kernel.name}_sm_{kernel.arch}"
        metadata = {**kernel.triton["metadata"], "hash": key, "target": vars(target), "extern_libs": []}
        files = {f"{kernel.function}.json": json.dumps(metadata).encode(), f"{kernel.function}.cubin": kernel.cubin}
        with tempfile.TemporaryDirectory() as folder:  # it is read at once
            paths = {name: Path(folder, name) for name in files}
            for name, content in files.items():
                paths[name].write_bytes(content)
            return CompiledKernel(src, {name: str(path) for name, path in paths.items()}, key)


def install(path: str | Path | None = None) -> bool:
    """Make launches of this process take kernels from the library at `path`, by default `COARS_KERNELS_AOT`.

    Kernels that were launched before keep what they have, so it belongs before the first launch; the modules
    with Triton kernels call it when they are imported. A second call with another path changes the library.

    Returns:
        Whether a library is in use: not where no path is given, or Triton is not installed.

    Raises:
        ValueError: the file cannot be read, or is no such library.
    """
    path = path or os.environ.get(VARIABLE)
    if not path:
        return False
    try:
        import triton.compiler
    except ImportError:
        log.warning("%s: %s is not used: Triton is not installed, and no kernel is launched without it", VARIABLE, path)
        return False
    current = triton.compiler.compile
    if isinstance(current, _Loader) and current.library.path == Path(path):
        return True
    original = current.compile_by_triton if isinstance(current, _Loader) else current
    triton.compiler.compile = _Loader(Library(path), original)
    return True


def counts() -> dict[str, int]:
    """How many kernels this process took from the library, and compiled in spite of it."""
    import triton.compiler

    loader = triton.compiler.compile
    in_use = isinstance(loader, _Loader)
    return {"taken": loader.num_taken if in_use else 0, "compiled": loader.num_compiled if in_use else 0}
