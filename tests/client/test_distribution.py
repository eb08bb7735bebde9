"""The distribution that `make client` builds, and the code of its README."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.serving import FakeDetector, picture, serving

CLIENT = Path(__file__).parents[2] / "client"
BUILD = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the wheel and the sdist, built in a copy, without a download."""
    copy = tmp_path_factory.mktemp("client") / "client"
    shutil.copytree(CLIENT, copy, ignore=shutil.ignore_patterns("dist", "build", "*.egg-info", "__pycache__"))
    subprocess.run([sys.executable, "-c", BUILD], cwd=copy, check=True, capture_output=True)
    return copy / "dist"


def test_the_wheel_holds_the_package_its_types_and_one_dependency(built: Path) -> None:
    [wheel] = built.glob("retinaserve_client-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        [metadata] = [name for name in archive.namelist() if name.endswith("METADATA")]
        text = archive.read(metadata).decode()
    modules = {f"retinaserve_client/{path.name}" for path in (CLIENT / "retinaserve_client").glob("*.py")}
    assert names == modules | {"retinaserve_client/py.typed"}
    assert re.findall("^Requires-Dist: ([a-z0-9]+)", text, re.MULTILINE) == ["httpx"]


def test_the_sdist_holds_what_it_is_built_from(built: Path) -> None:
    [sdist] = built.glob("retinaserve_client-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "retinaserve_client/py.typed", "retinaserve_client/__init__.py"} <= names


def test_the_readme_s_lines_run(tmp_path: Path) -> None:
    [lines] = re.findall(r"```python\n(.*?)```", (CLIENT / "README.md").read_text(), re.DOTALL)
    assert len(lines.splitlines()) <= 10
    (tmp_path / "photos").mkdir()
    for name in ("photo.jpg", "photos/a.jpg", "photos/c.jpg"):
        (tmp_path / name).write_bytes(picture())
    (tmp_path / "photos" / "b.jpg").write_bytes(b"no picture")
    with serving(FakeDetector()) as server:
        program = f"import sys; sys.path.insert(0, {str(CLIENT)!r})\n" + lines.replace(
            "http://127.0.0.1:8000", server.url
        )
        done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    first, a, b, c = done.stdout.splitlines()
    assert first == "circle 0.784314 0.0 0.0 80.0 64.0"
    assert (a, c) == ("photos/a.jpg 1", "photos/c.jpg 1")
    assert b.startswith("photos/b.jpg failed: invalid_image (422)")
