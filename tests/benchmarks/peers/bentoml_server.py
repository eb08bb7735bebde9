"""BentoML: one worker process with two threads, so that one request is decoded while the other is inferred.

`bentoml serve tests.benchmarks.peers.bentoml_server:Service`. No batching, as in litserve_server.py.
"""

from pathlib import Path
from typing import Any

import bentoml

from tests.benchmarks.peers.detection import Detection


@bentoml.service(
    workers=1,
    threads=2,
    traffic={"timeout": 600},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Service:
    def __init__(self) -> None:
        self.detection = Detection()

    @bentoml.api(route="/detect")  # type: ignore[untyped-decorator]
    def detect(self, image: Path) -> dict[str, Any]:
        return self.detection(image.read_bytes())
