"""Who may import whom, read off the source; and that what serves runs where torch is absent."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "service", "training")
WITH_TORCH = {
    "model/anchors.py",
    "model/backbones.py",
    "model/pyramid.py",
    "model/retinanet.py",
    "model/candidates.py",
    "model/folding.py",
}
HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "pycocotools", "matplotlib", "tensorboard")
"""What the service does not install."""


def source_files() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module the file names, in functions too; `from model import image` gives model.image."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(path: str) -> tuple[str, ...]:
    """Our packages that the file may import."""
    return ("model",) if path.startswith("model/") else ("model", path.split("/")[0])


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_from_service_and_training_to_model_and_never_across(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    for module in imports(path):
        top = module.split(".")[0]
        assert top not in PACKAGES or top in allowed(name), f"{name} imports {module}"
        assert top != "tests", f"{name} imports {module}"
        if top in HEAVY:
            assert name in WITH_TORCH or name.startswith("training/"), f"{name} imports {module}"


def test_what_needs_no_torch_never_imports_what_does() -> None:
    with_torch = {name.removesuffix(".py").replace("/", ".") for name in WITH_TORCH}
    for path in source_files():
        name = path.relative_to(ROOT).as_posix()
        if name not in WITH_TORCH and not name.startswith("training/"):
            for module in imports(path):
                assert module not in with_torch and module.rpartition(".")[0] not in with_torch, f"{name}: {module}"


WITHOUT_TORCH = """
import importlib, pathlib, pkgutil, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {heavy}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (absent where the service runs)", name=name)

sys.meta_path.insert(0, Absent())

import numpy
import service
from model.detector import Detector
for module in pkgutil.walk_packages(service.__path__, "service."):
    importlib.import_module(module.name)
print(len(Detector(pathlib.Path(sys.argv[1])).detect(numpy.full((60, 80, 3), 128, "uint8"), score_threshold=0)))
"""


def test_the_service_imports_and_detects_where_torch_is_absent(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "tiny.onnx")
    program = WITHOUT_TORCH.format(heavy=HEAVY)
    command = [sys.executable, "-W", "error", "-c", program, str(tmp_path / "tiny.onnx")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "16\n"
