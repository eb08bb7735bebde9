"""The service below a path prefix: behind a proxy that takes the prefix off, and behind one that does not."""

import contextlib
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from tests.support.load import free_ports, listens
from tests.support.serving import PNG, FakeDetector, picture, serving, wait_until

HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
PROXY = """
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen api
  bind 127.0.0.1:{port}
  http-request return status 404 if !{{ path_beg /detector/ }}
  http-request set-path %[path,regsub(^/detector,)]
  server only {address}
"""


@contextlib.contextmanager
def proxy_that_strips(folder: Path, url: str) -> Iterator[str]:
    """An haproxy that shows the service below /detector, and nothing else."""
    [port] = free_ports(1)
    config = folder / "haproxy.cfg"
    config.write_text(PROXY.format(port=port, address=url.removeprefix("http://")))
    process = subprocess.Popen([str(HAPROXY), "-db", "-f", str(config)])
    try:
        wait_until(lambda: process.poll() is not None or listens(f"http://127.0.0.1:{port}"))
        yield f"http://127.0.0.1:{port}/detector"
    finally:
        process.terminate()
        process.wait(30)


@pytest.mark.skipif(HAPROXY is None, reason="needs haproxy, Debian's package of that name")
@pytest.mark.parametrize("root_path", ["/detector", None])
def test_the_docs_work_behind_a_proxy_that_strips_a_prefix(tmp_path: Path, root_path: str | None) -> None:
    with serving(FakeDetector(), root_path=root_path) as server, proxy_that_strips(tmp_path, server.url) as url:
        page = httpx.get(f"{url}/docs").text
        links = re.findall(r"""(?:src|href)=["']([^"']+)""", page)
        assert len(links) == 3
        for link in links:
            assert httpx.get(urljoin(f"{url}/docs", link)).status_code == 200
        [link] = re.findall(r"url: '([^']+)'", page)
        document_url = urljoin(f"{url}/docs", link)
        document = httpx.get(document_url).json()
        if root_path:
            [named] = document["servers"]
            detect_url = urljoin(document_url, named["url"]) + "/detect"
            assert httpx.post(detect_url, content=picture(), headers=PNG).status_code == 200


@pytest.mark.parametrize("prefix", ["/detector", "/detect", "/vision/model"])
def test_the_prefix_may_come_with_the_request_or_not(prefix: str) -> None:
    with serving(FakeDetector(), root_path=prefix, api_keys="k") as server:
        assert server.client.get(f"{prefix}/healthz").status_code == 200, "open, as without the prefix"
        assert server.client.get(f"{prefix}/model").status_code == 401
        server.client.headers["X-API-Key"] = "k"
        for path in ("/detect", f"{prefix}/detect", "/detect/batch", f"{prefix}/detect/batch"):
            assert server.client.post(path, files={"image": picture()}).status_code == 200
        assert server.metric("http_requests_total", method="POST", route="/detect", status="200") == 2
        assert server.client.get(f"{prefix}/static-offline-docs/favicon.png").status_code == 200
        assert server.client.get(f"{prefix}x/model").status_code == 404
