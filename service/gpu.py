"""GPU metrics from NVML, sampled on a thread of their own, so that a scrape never waits for the driver.

The metrics are those of whole devices: in containers NVML cannot tell processes apart. Without NVML they do not exist.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
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
        self._missing: set[tuple[str, str]] = set()

    def sample(self, nvml: Any) -> None:
        """Read every GPU, each metric by itself: a MIG slice has no utilisation. A missing metric is logged once.

        Raises NVML's error if a GPU cannot be opened.
        """
        figures: dict[str, Callable[[Any, Any, tuple[str, str]], None]] = {
            "memory": self._read_memory,
            "utilisation": self._read_utilization,
            "temperature": self._read_temperature,
            "energy": self._read_energy,
        }
        for index in range(nvml.nvmlDeviceGetCount()):
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            labels = str(index), nvml.nvmlDeviceGetUUID(handle)
            for figure, read in figures.items():
                try:
                    read(nvml, handle, labels)
                except nvml.NVMLError as error:
                    self._tell_once(figure, labels, error)

    def _tell_once(self, figure: str, labels: tuple[str, str], error: Exception) -> None:
        missing = (figure, labels[1])
        if missing not in self._missing:
            self._missing.add(missing)
            logger.warning("GPU %s: no metric of its %s: %s", labels[0], figure, error)

    def _read_memory(self, nvml: Any, handle: Any, labels: tuple[str, str]) -> None:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
        self._memory_used.labels(*labels).set(memory.used)
        self._memory_total.labels(*labels).set(memory.total)

    def _read_utilization(self, nvml: Any, handle: Any, labels: tuple[str, str]) -> None:
        self._utilization.labels(*labels).set(nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100)

    def _read_temperature(self, nvml: Any, handle: Any, labels: tuple[str, str]) -> None:
        self._temperature.labels(*labels).set(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))

    def _read_energy(self, nvml: Any, handle: Any, labels: tuple[str, str]) -> None:
        joules = nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        self._energy.labels(*labels).inc(max(0, joules - self._joules.get(labels[1], 0)))
        self._joules[labels[1]] = joules


@contextlib.contextmanager
def sample_gpus(metrics: Metrics, nvml: Any = pynvml) -> Iterator[None]:
    """Keep the GPU gauges up to date within this context, if NVML answers."""
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
