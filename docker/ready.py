"""The container's health check: says "ready" and exits 0 when this replica's /readyz answers 200, else why not and 1.

The slim image has no curl.
"""

import os
import sys
import urllib.error
import urllib.request

url = f"http://127.0.0.1:{os.environ.get('RETINASERVE_PORT', '8000')}/readyz"
try:
    urllib.request.urlopen(url, timeout=8).close()
except (urllib.error.URLError, TimeoutError) as error:
    sys.exit(f"{url}: {error}")
print("ready")
