"""Ray Serve: one replica, whose requests run in threads beside its event loop, many ongoing at once.

One replica, because a second would share the same cores; `max_ongoing_requests` above the clients, so that the proxy
passes requests on at once. The proxy is Ray's own, without access log.
"""

import asyncio
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import ray
from ray import serve
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse

from tests.benchmarks.peers.detection import Detection, port


@serve.deployment(num_replicas=1, max_ongoing_requests=100, ray_actor_options={"num_cpus": 1})  # type: ignore[untyped-decorator]
class Service:
    def __init__(self) -> None:
        self.detection = Detection()
        self.pool = ThreadPoolExecutor(2)

    async def __call__(self, request: Request) -> JSONResponse:
        data = await request.body()
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(self.pool, self.detection, data))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)  # its processes inherit our environment
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port()}, logging_config=quiet)
    serve.run(Service.bind(), route_prefix="/detect", logging_config=quiet)  # type: ignore[attr-defined]
    threading.Event().wait()
