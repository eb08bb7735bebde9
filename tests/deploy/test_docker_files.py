"""Checks of the Docker files without an engine: they agree with the project and the service's settings."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.config import MIB, Settings

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PROXY = (ROOT / "docker" / "haproxy" / "haproxy.cfg").read_text()
SERVICE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["service"]


def default(setting: str) -> Any:
    return Settings.model_fields[setting].default


def seconds(name: str) -> float:
    """A time of the proxy's configuration."""
    [(number, unit)] = re.findall(rf"\b{name} (\d+)(ms|s)\b", PROXY)
    return int(number) / (1000 if unit == "ms" else 1)


def test_the_image_carries_the_projects_version() -> None:
    assert f"ARG VERSION={PROJECT['version']}\n" in (ROOT / "docker" / "Dockerfile").read_text()


@pytest.mark.parametrize("runtime", ["cpu", "gpu"])
def test_every_requirement_is_pinned_and_hashed(runtime: str) -> None:
    pins = (ROOT / "docker" / f"requirements-{runtime}.txt").read_text()
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"][runtime]
    names = {re.split(r"[\[<>=~!]", requirement)[0] for requirement in wanted}
    pinned = re.findall(r"^([a-z0-9-]+)==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", pins, flags=re.MULTILINE)
    assert names <= set(pinned)
    assert len(pinned) == len(re.findall(r"^[a-z]", pins, flags=re.MULTILINE))
    assert "://" not in pins


def test_the_proxy_lets_through_whatever_the_service_accepts() -> None:
    one, batch = (int(number) * MIB for number in re.findall(r"-m int ge (\d+)", PROXY))
    assert one > default("max_image_bytes") * 4 / 3  # base64 in JSON
    assert batch >= default("max_upload_bytes_in_flight")


def test_the_services_deadlines_come_before_the_proxys() -> None:
    assert seconds("timeout server") > default("request_timeout_seconds")
    assert seconds("timeout client") > default("upload_timeout_seconds")


def test_the_proxy_notices_a_draining_replica_before_it_stops_listening() -> None:
    [checks] = re.findall(r"\bfall (\d+)", PROXY)
    assert seconds("inter") * (int(checks) + 1) < default("drain_delay_seconds")


def test_a_replica_is_killed_only_after_its_longest_drain() -> None:
    longest = sum(map(default, ("drain_delay_seconds", "upload_timeout_seconds", "request_timeout_seconds")))
    assert int(SERVICE["stop_grace_period"].removesuffix("s")) > longest


def test_the_number_of_replicas_is_a_setting() -> None:
    assert SERVICE["deploy"]["replicas"] == "${REPLICAS:-1}"


def test_uploads_fit_the_scratch_space() -> None:
    [size] = re.findall(r"/tmp:size=(\d+)m", SERVICE["tmpfs"][0])
    assert int(size) * MIB > default("max_upload_bytes_in_flight")


def test_every_environment_variable_is_a_setting() -> None:
    assert SERVICE["environment"].keys() <= {f"RETINASERVE_{name.upper()}" for name in Settings.model_fields}


def test_every_image_and_action_is_pinned() -> None:
    images = re.findall(r"^    image: (\S+)", (ROOT / "docker-compose.yml").read_text(), flags=re.MULTILINE)
    assert all(re.search(r":v?\d+\.\d+\.\d+$", image) or image.startswith("retinaserve:") for image in images)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert all(re.fullmatch(r"[0-9a-f]{40}", commit) for commit in re.findall(r"uses: \S+@(\S+)", workflow))


def documents() -> list[Path]:
    return [path for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docker/**/*")] if path.is_file()]


def test_no_document_tells_to_signal_through_the_engine() -> None:
    """It marks the container as stopped by hand, and Docker restarts it no more."""
    by_engine = re.compile(r"(docker|compose) kill (-s|--signal)")
    assert [str(path) for path in documents() if by_engine.search(path.read_text())] == []


def test_every_file_that_the_operators_page_names_is_there() -> None:
    text = (ROOT / "docs" / "operations.md").read_text()
    named = set(re.findall(r"\bdocker/[\w/.-]*\w\.(?:yml|yaml|sh|py|cfg|md)", text))
    assert len(named) > 8
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_every_variable_of_the_compose_files_is_in_the_operators_table() -> None:
    files = [ROOT / "docker-compose.yml", *(ROOT / "docker").glob("*.yml")]
    used = {name for path in files for name in re.findall(r"(?<!\$)\$\{(\w+)", path.read_text())}
    table = set(re.findall(r"`([A-Z_]+)`", (ROOT / "docs" / "operations.md").read_text()))
    assert used - table == set()
