"""The parts of the running service, and whether they can serve."""

from dataclasses import dataclass

from service.api.uploads import Uploads
from service.config import Settings
from service.core.engine import Engine
from service.core.store import ModelStore
from service.metrics import Metrics


@dataclass
class Service:
    settings: Settings
    metrics: Metrics
    store: ModelStore
    engine: Engine
    uploads: Uploads
    draining: bool = False

    def why_not_alive(self) -> str | None:
        if self.store.device_fault is not None:
            return f"the device has failed: {self.store.device_fault}"
        step, seconds = self.engine.line.oldest_step() or ("", 0)
        if seconds > 2 * self.settings.request_timeout_seconds:
            return f"one {step} has been under way for {seconds:.0f} s"
        return None

    def why_not_ready(self) -> str | None:
        if self.draining:
            return "draining"
        if self.store.current is None:
            return "loading the model"
        return self.why_not_alive()

    def refusal(self) -> Exception | None:
        """Say why no image can be admitted now."""
        return self.engine.refusal(1, self.settings.request_timeout_seconds)
