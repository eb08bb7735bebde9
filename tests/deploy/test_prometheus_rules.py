"""The alerts and recording rules: promtool runs their cases; each alert has a case and a runbook entry."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker" / "prometheus"
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)


def promtool(*arguments: str) -> None:
    """Run promtool beside the rules; its report is the failure's message."""
    result = subprocess.run(["promtool", *arguments], cwd=FOLDER, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def rules(kind: str) -> list[dict[str, object]]:
    groups = yaml.safe_load((FOLDER / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"] if kind in rule]


@needs_promtool
def test_prometheus_accepts_the_configuration_and_the_rules(tmp_path: Path) -> None:
    """With the mounts of docker-compose.yml at their places on this machine."""
    copy = shutil.copytree(FOLDER, tmp_path / "prometheus")
    config = copy / "prometheus.yml"
    config.write_text(config.read_text().replace("/etc/keys", str(FOLDER.parent / "keys" / "prometheus")))
    promtool("check", "config", str(config))


@needs_promtool
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", "rules_test.yml")


def test_every_alert_has_a_case_where_it_fires() -> None:
    tests = yaml.safe_load((FOLDER / "rules_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test.get("alert_rule_test", [])]
    firing = {case["alertname"] for case in cases if case["exp_alerts"]}
    assert firing == {rule["alert"] for rule in rules("alert")}


def test_every_alert_says_how_urgent_it_is_and_leads_to_its_runbook() -> None:
    runbook = (FOLDER.parents[1] / "docs" / "runbook.md").read_text()
    headings = re.findall(r"^## (Retinaserve\w+|Watchdog)$", runbook, flags=re.MULTILINE)
    alerts = rules("alert")
    assert headings == [alert["alert"] for alert in alerts]
    for alert in alerts:
        severities = {"none"} if alert["alert"] == "Watchdog" else {"page", "ticket"}
        assert alert["labels"]["severity"] in severities  # type: ignore[index]
        assert alert["annotations"]["runbook"] == f"docs/runbook.md#{str(alert['alert']).lower()}"  # type: ignore[index]


@needs_promtool
def test_the_rule_that_compose_writes_is_one(tmp_path: Path) -> None:
    """The number of replicas that the alerts expect, as the container's entry point writes it."""
    compose = yaml.safe_load((FOLDER.parents[1] / "docker-compose.yml").read_text())
    script = compose["services"]["prometheus"]["entrypoint"][2].replace("$$", "$").replace("/tmp", str(tmp_path))
    command = ["sh", "-c", script.replace("exec prometheus", "exec echo"), "prometheus", "--a=b"]
    written = subprocess.run(command, env={"EXPECTED_REPLICAS": "3"}, capture_output=True, text=True, check=True)
    assert written.stdout == "--a=b\n"
    promtool("check", "rules", str(tmp_path / "replicas.yml"))
    [group] = yaml.safe_load((tmp_path / "replicas.yml").read_text())["groups"]
    assert group["rules"] == [
        {"record": "retinaserve_replicas_wanted", "expr": "vector(3)", "labels": {"job": "retinaserve"}}
    ]


def test_the_objective_has_one_home() -> None:
    rules_text = (FOLDER / "rules.yml").read_text()
    dashboard = (FOLDER.parent / "grafana" / "dashboard.py").read_text()
    assert len(re.findall(r"0\.999|0\.001", rules_text)) == 1
    assert "0.001 " not in dashboard.replace("warn=0.001", "")


def test_recorded_names_say_level_metric_and_window() -> None:
    for rule in rules("record"):
        assert re.fullmatch(r"(job|instance|replica|outcome|stage):retinaserve_\w+:\w+", str(rule["record"]))
