"""GPU metrics from NVML, sampled on a thread of their own: a scrape never waits for the driver.

Device-level only: in containers NVML cannot tell processes apart. Where NVML does not answer there are no such series.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from service.metrics import Metrics

try:
    import pynvml
except ImportError:  # comes with the gpu extra only
    pynvml = None

logger = logging.getLogger(__name__)

SAMPLE_SECONDS = 5.0


class GpuGauges:
    def __init__(self, registry: CollectorRegistry) -> None:
        labels = ["gpu", "uuid"]

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"retinaserve_gpu_{name}", text, labels, registry=registry)

        self._memory_used = gauge("memory_used_bytes", "GPU memory in use, by any process.")
        self._memory_total = gauge("memory_total_bytes", "GPU memory there is.")
        self._utilization = gauge("utilization_ratio", "Share of the last period in which a kernel ran.")
        self._temperature = gauge("temperature_celsius", "GPU temperature.")
        self._energy = Counter(
            "retinaserve_gpu_energy_joules_total", "Energy used since the driver was loaded.", labels, registry=registry
        )
        self._joules: dict[str, float] = {}

    def sample(self, nvml: Any) -> None:
        """Read every GPU now. Raises NVML's error."""
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            labels = str(index), nvml.nvmlDeviceGetUUID(handle)
            memory = nvml.nvmlDeviceGetMemoryInfo(handle)
            self._memory_used.labels(*labels).set(memory.used)
            self._memory_total.labels(*labels).set(memory.total)
            self._utilization.labels(*labels).set(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)
            self._temperature.labels(*labels).set(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
            joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
            self._energy.labels(*labels).inc(max(0, joules - self._joules.get(labels[1], 0)))
            self._joules[labels[1]] = joules


@contextlib.contextmanager
def sample_gpus(metrics: Metrics, nvml: Any = pynvml) -> Iterator[None]:
    """Keep the GPU gauges fresh meanwhile, if NVML answers."""
    if nvml is None or not _starts(nvml):
        yield
        return
    stop = threading.Event()
    gauges = GpuGauges(metrics.registry)
    thread = threading.Thread(target=_sample_until, args=(stop, gauges, nvml), name="gpu metrics", daemon=True)
    thread.start()
    yield
    stop.set()


def _starts(nvml: Any) -> bool:
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        logger.info("no GPU metrics: %s", error)
        return False
    return True


def _sample_until(stop: threading.Event, gauges: GpuGauges, nvml: Any) -> None:
    while True:
        try:
            gauges.sample(nvml)
        except nvml.NVMLError as error:
            logger.warning("GPU metrics are incomplete: %s", error)
        if stop.wait(SAMPLE_SECONDS):
            return
