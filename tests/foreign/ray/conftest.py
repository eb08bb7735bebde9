"""Ray as these tests want it, set before it is imported: its processes take over this environment."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

os.environ |= {
    "PYTHONPATH": str(ROOT),  # replicas and actors import this checkout, whatever is installed
    "RAY_AUTH_MODE": "disabled",
    "RAY_DEDUP_LOGS": "0",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Warnings of Ray's own code are no errors of ours."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
