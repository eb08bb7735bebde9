"""GPU gauges, from an NVML written by hand."""

import logging
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from service.gpu import sample_gpus
from service.metrics import Metrics
from tests.support.serving import wait_until

OTHERS = ("memory_used_bytes", "temperature_celsius", "energy_joules_total")


class NVMLError(Exception):
    pass


@dataclass
class FakeNvml:
    """One GPU; `broken` makes the driver absent; a `slice` of one (MIG) has no utilisation."""

    broken: bool = False
    slice: bool = False
    count: int = 0
    joules: int = 500
    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("no driver")

    def nvmlDeviceGetCount(self) -> int:
        self.count += 1
        return 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return "GPU-1"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return SimpleNamespace(used=3, total=10)

    def nvmlDeviceGetUtilizationRates(self, handle: int) -> SimpleNamespace:
        if self.slice:
            raise NVMLError("not supported")
        return SimpleNamespace(gpu=40)

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return 55

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.joules * 1000


def test_the_gauges_are_in_base_units() -> None:
    metrics = Metrics()

    def value(name: str) -> float | None:
        return metrics.registry.get_sample_value(f"retinaserve_gpu_{name}", {"gpu": "0", "uuid": "GPU-1"})

    with sample_gpus(metrics, FakeNvml()):
        wait_until(lambda: value("energy_joules_total") == 500)
    assert (value("memory_used_bytes"), value("memory_total_bytes")) == (3, 10)
    assert (value("utilization_ratio"), value("temperature_celsius")) == (0.4, 55)


@pytest.mark.parametrize("nvml", [None, FakeNvml(broken=True)])
def test_without_nvml_there_are_no_gpu_series(nvml: FakeNvml | None, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    with caplog.at_level(logging.INFO), sample_gpus(metrics, nvml):
        assert b"retinaserve_gpu" not in metrics.text()


def test_a_figure_that_a_slice_of_a_gpu_has_not_is_told_once_and_the_others_stay(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.gpu.SAMPLE_SECONDS", 0.001)
    metrics, nvml = Metrics(), FakeNvml(slice=True)
    with sample_gpus(metrics, nvml):
        wait_until(lambda: nvml.count > 3)
    assert caplog.text.count("GPU 0: no metric of its utilisation: not supported") == 1
    labels = {"gpu": "0", "uuid": "GPU-1"}
    values = [metrics.registry.get_sample_value(f"retinaserve_gpu_{name}", labels) for name in OTHERS]
    assert values == [3, 55, 500]
