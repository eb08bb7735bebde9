"""Makes the rules a PrometheusRule: python docker/prometheus/kubernetes.py > docker/prometheus/kubernetes/rules.yaml

What Compose tells by a variable, how many replicas there shall be, kube-state-metrics tells here.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

WANTED = (
    'max(kube_deployment_spec_replicas{deployment="retinaserve"})'
    ' - max(kube_deployment_spec_strategy_rollingupdate_max_unavailable{deployment="retinaserve"})'
)
"""A rollout may take away so many."""


def render() -> dict[str, Any]:
    """The PrometheusRule, for the Prometheus operator."""
    groups: list[Any] = yaml.safe_load((Path(__file__).parent / "rules.yml").read_text())["groups"]
    wanted = {"record": "retinaserve_replicas_wanted", "expr": WANTED, "labels": {"job": "retinaserve"}}
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "retinaserve", "labels": {"release": "kube-prometheus-stack"}},
        "spec": {"groups": [{"name": "retinaserve-replicas", "rules": [wanted]}, *groups]},
    }


if __name__ == "__main__":
    sys.stdout.write("# Made by docker/prometheus/kubernetes.py out of rules.yml: edit that.\n")
    yaml.safe_dump(render(), sys.stdout, sort_keys=False, width=1000)
