"""Fake CUDA libraries under ONNX Runtime's real CUDA provider: what it asks of a GPU, counted without one.

Placement, memory, threads, streams, options and graph capture are ONNX Runtime's and ours; no kernel computes, so that
answers are zeros. `fake/cudart.c` and `fake/cudnn.c` hold what has an effect; of what else the provider imports, each
function answers 0.
"""

import ctypes
import os
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent / "fake"
LIBRARIES = ("libcudart", "libcublas", "libcublasLt", "libcurand")
"""Those whose functions the provider imports by name; cuDNN is opened when it is needed."""
MAKES_A_HANDLE = re.compile(r"^(cublasCreate_v2|cublasLtCreate|cublasLt\w+Create|curandCreateGenerator)$")


class Call(NamedTuple):
    """A line of `fake/note.h`."""

    thread: int
    capturing: bool
    what: str
    num_bytes: int
    address: int
    """Address of the device's memory that a copy reads or writes."""


class FakeCuda:
    """The fake libraries, in this process. Load them before ONNX Runtime opens its CUDA provider."""

    def __init__(self, folder: Path) -> None:
        """Build them in `folder`, by gcc, against the headers of the wheel nvidia-cuda-runtime."""
        self._log = folder / "calls"
        self._log.touch()
        os.environ["FAKE_CUDA_LOG"] = str(self._log)
        built = build(folder)
        loaded = [ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL) for path in built]
        self._cudart = next(library for library in loaded if "libcudart" in library._name)

    @contextmanager
    def calls(self) -> Iterator[list[Call]]:
        """Collect the calls of this context, once it has ended."""
        start, calls = self._log.stat().st_size, list[Call]()
        yield calls
        with self._log.open("rb") as log:
            log.seek(start)
            for thread, capturing, what, num_bytes, address in (line.decode().split() for line in log):
                calls.append(Call(int(thread), capturing == "1", what, int(num_bytes), int(address)))

    @property
    def held_bytes(self) -> int:
        return self._size("fake_held").value

    @property
    def most_held_bytes(self) -> int:
        return self._size("fake_most_held").value

    def forget_most_held(self) -> None:
        self._size("fake_most_held").value = self.held_bytes

    @contextmanager
    def capacity(self, num_bytes: int) -> Iterator[None]:
        """The card's memory is so large, inside."""
        before, self._size("fake_capacity").value = self._size("fake_capacity").value, num_bytes
        try:
            yield
        finally:
            self._size("fake_capacity").value = before

    @contextmanager
    def lost(self, error: int) -> Iterator[None]:
        """Every call fails with this cudaError_t, inside."""
        code = ctypes.c_int.in_dll(self._cudart, "fake_lost")
        code.value = error
        try:
            yield
        finally:
            code.value = 0

    def _size(self, name: str) -> ctypes.c_size_t:
        return ctypes.c_size_t.in_dll(self._cudart, name)


def build(folder: Path) -> list[Path]:
    """Compile the libraries into `folder`, in the order in which they can be loaded."""
    site = Path(__import__("onnxruntime").__file__).parents[1]
    wanted = imported_functions(site / "onnxruntime/capi/libonnxruntime_providers_cuda.so")
    [headers] = site.glob("nvidia/cu*/include/driver_types.h")
    written = set(re.findall(r"\b(\w+)\(", (HERE / "cudart.c").read_text()))
    for soname, functions in wanted.items():
        stubs = "".join(map(stub, sorted(functions - written)))
        include = '#include "cudart.c"\n' if soname.startswith("libcudart") else ""
        (folder / f"{soname}.c").write_text(include + stubs)
        (folder / f"{soname}.map").write_text(f"{soname} {{ global: *; }};\n")  # the provider asks for this version
        compile_library(folder / f"{soname}.c", folder / soname, headers.parent, f"-Wl,--version-script={soname}.map")
    (folder / "libcuda.so.1.c").write_text("int cuTensorMapEncodeTiled(void) { return 999; }\n")
    compile_library(folder / "libcuda.so.1.c", folder / "libcuda.so.1", headers.parent)
    compile_library(HERE / "cudnn.c", folder / "libcudnn.so.9", headers.parent)
    return [*(folder / soname for soname in wanted), folder / "libcuda.so.1", folder / "libcudnn.so.9"]


def imported_functions(provider: Path) -> Mapping[str, set[str]]:
    """The functions that the provider imports, by the library that must have them, which it needs even if of none."""
    headers = subprocess.run(["readelf", "-d", provider], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(lib(?:cudart|cublas|cublasLt|curand)\.so\.\d+)\]", headers)
    functions: dict[str, set[str]] = defaultdict(set, {soname: set() for soname in needed})
    symbols = subprocess.run(["nm", "-D", "--undefined-only", provider], capture_output=True, text=True, check=True)
    for name, soname in re.findall(r"U (\w+)@(\S+)", symbols.stdout):
        if soname.split(".")[0] in LIBRARIES:
            functions[soname].add(name)
    return functions


def stub(function: str) -> str:
    if MAKES_A_HANDLE.match(function):
        return f"int {function}(void **made) {{ *made = (void *)0x1000; return 0; }}\n"
    answer = '(long)"fake"' if "String" in function or "StatusName" in function else "0"
    return f"long {function}(void) {{ return {answer}; }}\n"


def compile_library(source: Path, library: Path, headers: Path, *options: str) -> None:
    command: Sequence[str | Path] = [
        "gcc", "-w", "-O1", "-shared", "-fPIC", f"-I{HERE}", f"-I{headers}", f"-Wl,-soname,{library.name}", *options,
        "-o", library, source,
    ]  # fmt: skip
    subprocess.run(command, cwd=library.parent, check=True)
