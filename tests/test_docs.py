"""README and docs are true: each link, flag, route, metric, make target, file and module that they name is there."""

import asyncio
import contextlib
import functools
import importlib.util
import io
import json
import re
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from cluster.__main__ import main as cluster
from service import detect
from service.__main__ import build_service
from service.api.app import create_app
from service.config import Settings, parse_settings
from service.metrics import Metrics
from tests.support import configuration
from tests.support.serving import server_process
from training.__main__ import COMMANDS
from training.__main__ import main as training

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
LOGS = ("docs/training-log.md", "docs/ablations.md")
"""Pages with commands and flags of the past."""
PRESENT = [name for name in PAGES if name not in LOGS]

BENCHMARKS = ROOT / "tests" / "benchmarks"

LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
BLOCK = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
CURL = re.compile(r"curl -s -F image=@(\S+) 'http://127\.0\.0\.1:8000(/detect\?\S+)'")
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
COMMAND = re.compile(r"python -m ((?:service|training|tests|client|cluster)[\w.]*)([^|;#`\n]*)")
METRIC = re.compile(r"\b(?:retinaserve|http)_(?!client\b|options\b)[a-z][a-z_]+[a-z]\b")


def code_of(page: str) -> list[str]:
    """The lines of its blocks, continued ones as one, and its spans."""
    text = PAGES[page]
    lines = [line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return lines + SPAN.findall(BLOCK.sub("", text))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in LINK.findall(PAGES[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in {slug(heading) for heading in HEADING.findall(target.read_text())}, link


def slug(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_index_has_every_page() -> None:
    linked = set(LINK.findall(PAGES["docs/README.md"]))
    assert {Path(page).name for page in PAGES if page.startswith("docs/")} - {"README.md"} <= linked


@pytest.mark.parametrize("page", PRESENT)
def test_commands_exist_and_take_their_flags(page: str) -> None:
    for code in code_of(page):
        for module, rest in COMMAND.findall(code):
            allowed = flags_of(module, rest.split()[0] if rest.split() else "")
            assert set(FLAG.findall(rest)) <= allowed, code


@pytest.mark.parametrize("page", PRESENT)
def test_flags_that_stand_alone_are_those_of_a_command(page: str) -> None:
    known = functools.reduce(set.union, (flags_of(*command) for command in commands()))
    named = {flag for code in code_of(page) if code.startswith("--") for flag in FLAG.findall(code)}
    assert named - known == set()


def commands() -> Iterator[tuple[str, str]]:
    yield from [("service", ""), ("service", "detect"), ("cluster", "detect"), ("cluster", "coco")]
    yield from (("training", command) for command in COMMANDS)
    for path in BENCHMARKS.rglob("*.py"):
        if "argparse" in path.read_text():
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts), ""


@functools.cache
def flags_of(module: str, word: str) -> set[str]:
    """The flags that `python -m MODULE [WORD]` takes."""
    if module == "service":
        return set(
            FLAG.findall(help_of(lambda: detect.main(["--help"]) if word == "detect" else parse_settings(["--help"])))
        )
    if module == "cluster":
        return set(FLAG.findall(help_of(lambda: cluster([word, "--help"] if word else ["--help"]))))
    if module == "training":
        assert word in COMMANDS or not word
        return set(FLAG.findall(help_of(lambda: training([word, "--help"] if word else ["--help"]))))
    found = importlib.util.find_spec(module)
    assert found is not None and found.origin is not None, f"no module {module}"
    origin = Path(found.origin)
    sources = [*origin.parent.glob("*.py")] if origin.name == "__init__.py" else [origin, BENCHMARKS / "measuring.py"]
    return {flag for source in sources for flag in re.findall(r'"(--[a-z0-9-]+)"', source.read_text())}


def help_of(call: Callable[[], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        call()
    return out.getvalue()


@pytest.mark.parametrize("page", PRESENT)
def test_routes_exist(page: str) -> None:
    named = {pair for code in code_of(page) for pair in re.findall(r"\b(GET|POST|HEAD) (/[\w/.]*)", code)}
    asked = {path for code in code_of(page) for path in re.findall(r"(?:127\.0\.0\.1|localhost):8000(/[\w/.]+)", code)}
    assert [(method, path) for method, path in named if status_of(method, path) in (404, 405)] == []
    assert [path for path in asked if status_of("GET", path) == 404] == []


@functools.cache
def status_of(method: str, path: str) -> int:
    """Return the status of a service without a model for an empty request."""

    async def ask() -> int:
        transport = httpx.ASGITransport(create_app(build_service(Settings())))
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return (await client.request(method, path)).status_code

    return asyncio.run(ask())


@pytest.mark.parametrize("page", PRESENT)
def test_metrics_exist(page: str) -> None:
    rules = (ROOT / "docker" / "prometheus" / "rules.yml").read_text() + (ROOT / "docker-compose.yml").read_text()
    families = list(Metrics().registry.collect())
    served = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    served |= {sample.name for family in families for sample in family.samples} | set(METRIC.findall(rules))
    named = {name for code in code_of(page) for name in METRIC.findall(code)}
    assert named - served == set()


@pytest.mark.parametrize("page", PRESENT)
def test_make_targets_exist(page: str) -> None:
    targets = set(re.findall(r"^([a-z][a-z0-9/-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {name for code in code_of(page) for name in re.findall(r"^make ([a-z][a-z0-9-]*)", code)}
    assert named - targets == set()


@pytest.mark.parametrize("page", PRESENT)
def test_files_of_the_repository_exist(page: str) -> None:
    named = re.compile(r"(?<![\w/.-])((?:model|service|training|tests|docker|docs|client|cluster)/[\w/.-]+\.\w+)")
    missing = {path for code in code_of(page) for path in named.findall(code) if not (ROOT / path).exists()}
    assert missing - MADE == set()


MADE = {"docker/keys/service/api-keys", "docker/keys/prometheus/key", "docker/keys/alertmanager/webhook"}
"""Which an operator makes."""


def test_every_test_that_the_security_page_names_exists() -> None:
    page = PAGES["docs/security.md"]
    source = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(?:…|test_\w+\.py)::(test_\w+)`", page))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in source] == []
    files = set(re.findall(r"`(test_\w+\.py)[`:]", page))
    assert [name for name in files if not list((ROOT / "tests").rglob(name))] == []


def test_the_page_of_settings_is_made_of_the_settings() -> None:
    assert PAGES["docs/configuration.md"] == configuration.page(), "run `make docs`"


@pytest.mark.slow
def test_the_readmes_curl_prints_the_detections_that_it_shows(tmp_path: Path) -> None:
    [(example, path)] = CURL.findall(PAGES["README.md"])
    shown = json.loads(re.findall(r"```json\n(.*?)```", PAGES["README.md"], re.DOTALL)[0])
    with server_process(tmp_path, model_path=ROOT / "model" / "pretrained" / "shapes.onnx") as server:
        answer = httpx.post(server.url + path, files={"image": (ROOT / example).read_bytes()}, timeout=60).json()
    assert set(answer) == set(shown)
    assert answer["model"] == shown["model"]
    assert answer["image"] == shown["image"]
    assert answer["timing_ms"].keys() == shown["timing_ms"].keys()
    assert len(answer["detections"]) == len(shown["detections"]) > 1
    for found, expected in zip(answer["detections"], shown["detections"], strict=True):
        assert (found["label"], found["class_id"]) == (expected["label"], expected["class_id"])
        assert found["score"] == pytest.approx(expected["score"], abs=0.01)
        assert found["box"] == pytest.approx(expected["box"], abs=1)


@pytest.mark.parametrize("target", ["models/coco.onnx", "demo-model", "data/shapes", "serve"])
def test_the_commands_of_make_take_their_flags(target: str) -> None:
    dry = ["make", "--dry-run", "--always-make", "--assume-old", "install", target]
    printed = subprocess.run(dry, cwd=ROOT, check=True, capture_output=True, text=True).stdout.replace("\\\n", " ")
    ours = [found for found in COMMAND.findall(printed) if found[0] in ("service", "training")]
    assert ours
    for module, rest in ours:
        assert set(FLAG.findall(rest)) <= flags_of(module, rest.split()[0] if rest.split() else "")


def test_the_readme_is_a_page() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 90
    assert len(PAGES["README.md"].split()) < 700


def test_console_scripts_are_the_commands(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    usages = {"retinaserve": "usage: python -m service ", "retinaserve-train": "usage: python -m training "}
    assert scripts.keys() == usages.keys()
    for name, target in scripts.items():
        module, _, function = target.partition(":")
        monkeypatch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit) as ended:
            getattr(importlib.import_module(module), function)()
        assert ended.value.code == 0
        assert capsys.readouterr().out.startswith(usages[name])
