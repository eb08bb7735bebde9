"""The service itself on Ray Serve: one replica of all threads, for `tests.benchmarks.ray`."""

import os
import signal
import sys
import threading

import ray
from ray import serve

from cluster.serve import Arguments, app
from tests.benchmarks.peers.detection import port

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    cores = int(os.environ["BENCHMARK_THREADS"])
    arguments = Arguments(
        model=os.environ["BENCHMARK_MODEL"], num_cpus=cores, queue_capacity=64, request_timeout_seconds=600
    )
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False)  # its processes inherit our environment
    serve.start(http_options={"host": "127.0.0.1", "port": port()})
    serve.run(app(arguments), route_prefix="/")
    threading.Event().wait()
