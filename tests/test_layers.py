"""Who may import whom, read off the source; and that what serves runs where torch is absent."""

import ast
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.support.tiny_model import write_tiny_model

ROOT = Path(__file__).parents[1]
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "model": (),
    "training": ("model",),
    "service": ("model",),
    "cluster": ("service", "model"),
    "client": (),
}
"""Our packages, each with those of the others that it may import."""
WITH_TORCH = {
    "model/anchors.py",
    "model/backbones.py",
    "model/pyramid.py",
    "model/retinanet.py",
    "model/candidates.py",
    "model/folding.py",
}
"""In training too, every file may import it."""
HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "pycocotools", "matplotlib", "tensorboard")
"""Packages that the service does not install."""
NOT_IN_CORE = ("fastapi", "starlette", "uvicorn", "httpx", "service.api", "service.config")


def source_files() -> list[Path]:
    return [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> Iterator[str]:
    """Every module the file names, in functions too; `from model import image` gives model.image."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, packages: Iterable[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def refusal(file: str, module: str) -> str:
    """Say why this file may not import this module; empty: it may."""
    package, imported = file.split("/")[0], module.split(".")[0]
    without_torch = file not in WITH_TORCH and package != "training"
    if imported == "tests":
        return "the product stands without its tests"
    if imported in MAY_IMPORT and imported not in (package, *MAY_IMPORT[package]):
        return f"{package} knows only {', '.join(MAY_IMPORT[package]) or 'itself'}"
    if without_torch and within(module, HEAVY):
        return "the service does not install it"
    if without_torch and within(module, (name.removesuffix(".py").replace("/", ".") for name in WITH_TORCH)):
        return "it needs torch, which the service does not install"
    if file.startswith("service/core/") and within(module, NOT_IN_CORE):
        return "core knows neither HTTP nor settings"
    below_api = package == "service" and not file.startswith(("service/api/", "service/__main__"))
    if below_api and within(module, ["service.api"]):
        return "of the service, __main__ alone stands above api"
    return ""


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_import_goes_down(path: Path) -> None:
    file = path.relative_to(ROOT).as_posix()
    assert {module: why for module in imports(path) if (why := refusal(file, module))} == {}


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("service/core/engine.py", "tests.support.load"),
        ("model/types.py", "service.metrics"),
        ("training/train.py", "service.config"),
        ("service/detect.py", "training.coco"),
        ("service/detect.py", "cluster.work"),
        ("cluster/work.py", "training.coco"),
        ("client/__init__.py", "model.types"),
        ("service/gpu.py", "torch"),
        ("model/image.py", "onnx.helper"),
        ("model/detector.py", "model.anchors.boxes_of"),
        ("service/core/engine.py", "starlette.types.Send"),
        ("service/core/engine.py", "service.api"),
        ("service/core/store.py", "service.config.Settings"),
        ("service/metrics.py", "service.api.errors.OUTCOMES"),
    ],
)
def test_an_import_that_goes_up_or_across_is_refused(file: str, module: str) -> None:
    assert refusal(file, module)


@pytest.mark.parametrize(
    ("file", "module"),
    [
        ("service/__main__.py", "service.api.app.create_app"),
        ("service/api/app.py", "service.core.engine.Engine"),
        ("cluster/work.py", "service.config.Settings"),
        ("training/train.py", "torch"),
        ("model/candidates.py", "model.anchors.boxes_of"),
        ("service/core/engine.py", "model.types.Candidates"),
    ],
)
def test_an_import_that_goes_down_is_not(file: str, module: str) -> None:
    assert refusal(file, module) == ""


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
