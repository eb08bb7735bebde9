"""Ray as these tests want it: its processes take over the environment in which it is imported."""

import os
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

os.environ |= {
    "PYTHONPATH": str(ROOT),  # replicas and actors import this checkout, whatever is installed
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Ray's own code
    import ray.data
    import ray.serve  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave Ray's warnings warnings."""
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))
