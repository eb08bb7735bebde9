"""The demo model that ships, and the choice between its files.

`shapes.onnx` is fp32 and runs everywhere. `shapes-int8.onnx` is the same network for CPUs that sum products of 8 bits
in 32 bits (VNNI, AMX), where it is 1.6 times as fast; on others it is 1.1 times as fast (docs/benchmarks.md).
"""

from pathlib import Path

from model.detector import Device
from model.runtime.session import has_cuda_build

PRETRAINED = Path(__file__).parent / "pretrained" / "shapes.onnx"
EXAMPLE_PICTURE = PRETRAINED.parent / "example.jpg"
"""A drawn picture, as an example."""
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8"})


def demo_model(device: Device, folder: Path = PRETRAINED.parent, cpuinfo: Path = Path("/proc/cpuinfo")) -> Path:
    """Return the int8 file if it ships, a CPU will compute, and that is fast at int8; else the fp32 file."""
    int8 = folder / "shapes-int8.onnx"
    on_cpu = device == "cpu" or not has_cuda_build()
    return int8 if on_cpu and int8.exists() and is_fast_at_int8(cpuinfo) else folder / PRETRAINED.name


def is_fast_at_int8(cpuinfo: Path) -> bool:
    """Tell by the flags of the first core whether a CPU is fast at int8; False if they cannot be read."""
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return False
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return not INT8_FLAGS.isdisjoint(flags)
