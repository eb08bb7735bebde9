"""The container's health check: says "ready" and exits 0 when this replica's /readyz answers 200, else why not and 1.

With `--end PID` it also ends that process where /healthz answers 503, which nothing but a new process mends: Compose
restarts what has ended, and leaves alone what is unhealthy. The slim image has no curl.
"""

import os
import signal
import sys
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('RETINASERVE_PORT', '8000')}"


def why_not(path: str) -> str:
    """The reason why this path does not answer 200; empty: it does."""
    try:
        urllib.request.urlopen(url + path, timeout=8).close()
    except (urllib.error.URLError, TimeoutError) as error:
        return f"{url}{path}: {error}"
    return ""


if reason := why_not("/readyz"):
    if sys.argv[1:2] == ["--end"] and "HTTP Error 503" in why_not("/healthz"):
        os.kill(int(sys.argv[2]), signal.SIGTERM)
    sys.exit(reason)
print("ready")
