"""Which of the demo model's files `make serve` serves."""

from pathlib import Path

import pytest

from model.pretrained import PRETRAINED, demo_model
from model.runtime.session import has_cuda_build
from service.config import Settings

PLAIN = "processor : 0\nflags\t\t: fpu sse avx2 avx512f\n"
VNNI = "processor : 0\nflags\t\t: fpu sse avx2 avx_vnni\n"
ARM = "processor : 0\nFeatures : fp asimd asimddp\n"


def choice(folder: Path, cpuinfo: str) -> str:
    (folder / "cpuinfo").write_text(cpuinfo)
    return demo_model("cpu", folder, folder / "cpuinfo").name


@pytest.mark.parametrize(
    ("cpuinfo", "name"), [(VNNI, "shapes-int8.onnx"), (PLAIN, "shapes.onnx"), (ARM, "shapes.onnx")]
)
def test_the_int8_file_serves_where_the_cpu_is_fast_at_int8(tmp_path: Path, cpuinfo: str, name: str) -> None:
    (tmp_path / "shapes-int8.onnx").touch()
    assert choice(tmp_path, cpuinfo) == name


def test_the_fp32_file_serves_where_no_int8_file_ships_or_no_flags_can_be_read(tmp_path: Path) -> None:
    assert choice(tmp_path, VNNI) == "shapes.onnx"
    (tmp_path / "shapes-int8.onnx").touch()
    assert demo_model("cpu", tmp_path, tmp_path / "missing").name == "shapes.onnx"


@pytest.mark.skipif(not has_cuda_build(), reason="needs ONNX Runtime's CUDA build")
def test_a_gpu_gets_the_fp32_file(tmp_path: Path) -> None:
    (tmp_path / "shapes-int8.onnx").touch()
    (tmp_path / "cpuinfo").write_text(VNNI)
    assert demo_model("cuda", tmp_path, tmp_path / "cpuinfo").name == "shapes.onnx"


def test_a_model_that_was_asked_for_is_served_as_it_is() -> None:
    assert Settings(model=Path("a.onnx")).model_file == Path("a.onnx")
    assert Settings().model_file.parent == PRETRAINED.parent
    assert Settings().model_file.exists()
