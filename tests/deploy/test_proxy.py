"""docker/haproxy/haproxy.cfg in a real haproxy, before replicas that are stand-ins and behind a DNS of its own.

Ids, logs, errors, metrics, TLS, and reloads under load: what takes no container. Only ports and the DNS server's
address differ from the file.
"""

import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.load import free_ports
from tests.support.serving import wait_until

HAPROXY = shutil.which("haproxy") or shutil.which("/usr/sbin/haproxy")
OPENSSL = shutil.which("openssl")
CONFIG = Path(__file__).parents[2] / "docker" / "haproxy" / "haproxy.cfg"
pytestmark = pytest.mark.skipif(HAPROXY is None, reason="needs haproxy, Debian's package of that name")


class Replica(BaseHTTPRequestHandler):
    """Answers with the id that it was sent. /lost closes the connection, /broken is a 500."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/lost":
            self.close_connection = True
            return
        if self.path == "/slow":
            time.sleep(1)
        body = json.dumps({"request_id": self.headers.get("X-Request-ID")}).encode()
        self.send_response(500 if self.path == "/broken" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("X-Request-ID", self.headers.get("X-Request-ID", ""))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def replica() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Replica) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


@contextlib.contextmanager
def name_server() -> Iterator[int]:
    """A DNS server for which every name is at 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        over = threading.Event()

        def serve() -> None:
            while not over.is_set():
                with contextlib.suppress(TimeoutError):
                    query, client = server.recvfrom(4096)
                    end = query.index(b"\0", 12) + 5  # the name, its type and class
                    is_ipv4 = query[end - 4 : end - 2] == b"\0\1"
                    answer = b"\xc0\x0c\0\1\0\1\0\0\0\1\0\4\x7f\0\0\1" if is_ipv4 else b""
                    counts = b"\0\1" + (b"\0\1" if is_ipv4 else b"\0\0") + b"\0\0\0\0"
                    server.sendto(query[:2] + b"\x81\x80" + counts + query[12:end] + answer, client)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield server.getsockname()[1]
        finally:
            over.set()
            thread.join()


@dataclass
class Proxy:
    process: subprocess.Popen[bytes]
    log_file: Path
    api: str
    operator: str
    https: str = ""

    def lines(self, request_id: str = "") -> list[dict[str, Any]]:
        """The log's lines about a request; a line that is not JSON is haproxy's own, about its servers."""
        lines = [json.loads(line) for line in self.log_file.read_text().splitlines() if line.startswith("{")]
        return [line for line in lines if request_id in line["request_id"]]

    def reload(self) -> None:
        """As `kill -USR2 1` in the container; returns when the new process serves."""
        before = self.log_file.read_text().count("forked")
        self.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: self.log_file.read_text().count("forked") > before)

    def has_replicas(self) -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.operator}/healthz").status_code == 200
        return False


@contextlib.contextmanager
def proxy(folder: Path, replica_port: int, **environment: str) -> Iterator[Proxy]:
    api, operator, https = free_ports(3)
    with name_server() as dns:
        text = CONFIG.read_text()
        for old, new in (
            ("bind :8000", f"bind 127.0.0.1:{api}"),
            ("bind :8443", f"bind 127.0.0.1:{https}"),
            ("bind :8405", f"bind 127.0.0.1:{operator}"),
            ("/usr/local/etc/haproxy/", f"{CONFIG.parent}/"),
            ("127.0.0.11:53", f"127.0.0.1:{dns}"),
            ("replica 16 service:8000", f"replica 1 service:{replica_port}"),
            ("canary 4 canary:8000", f"canary 1 canary:{environment.get('CANARY_PORT', 1)}"),
        ):
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        (folder / "haproxy.cfg").write_text(text)
        log_file = folder / "haproxy.log"
        with log_file.open("wb") as log:
            command = [str(HAPROXY), "-W", "-db", "-f", str(folder / "haproxy.cfg")]
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment | {"HTTPS_PORT": str(https)})
        running = Proxy(
            process, log_file, f"http://127.0.0.1:{api}", f"http://127.0.0.1:{operator}", f"https://127.0.0.1:{https}"
        )
        try:
            wait_until(lambda: process.poll() is not None or running.has_replicas())
            assert process.poll() is None, log_file.read_text()
            yield running
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with replica() as port, proxy(tmp_path_factory.mktemp("proxy"), port) as running:
        yield running


@dataclass
class Load:
    """Clients that ask one time after the other, each on a new connection or all on their own, until the block ends."""

    url: str
    verify: ssl.SSLContext | bool = True
    answers: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> "Load":
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(kept,)) for kept in (True, True, False, False)]
        for thread in self._threads:
            thread.start()
        self.wait_for_answers(20)
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _ask(self, kept: bool) -> None:
        headers = {} if kept else {"Connection": "close"}
        with httpx.Client(timeout=20, verify=self.verify) as client:
            while not self._over.wait(0.005):
                try:
                    self.answers[str(client.post(f"{self.url}/detect", content=b"a", headers=headers).status_code)] += 1
                except httpx.TransportError as error:
                    self.answers[type(error).__name__] += 1

    def wait_for_answers(self, number: int) -> None:
        wanted = self.answers.total() + number
        wait_until(lambda: self.answers.total() >= wanted)


def test_an_id_of_the_client_reaches_the_replica_the_answer_and_the_log(running: Proxy) -> None:
    answer = httpx.get(f"{running.api}/model?x=1", headers={"X-Request-ID": "customer-7"})
    assert (answer.json()["request_id"], answer.headers["X-Request-ID"]) == ("customer-7", "customer-7")
    wait_until(lambda: bool(running.lines("customer-7")))
    [line] = running.lines("customer-7")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["time"])
    expected = {
        "backend": "replicas",
        "level": "info",
        "client": "127.0.0.1",
        "method": "GET",
        "path": "/model",
        "status": 200,
        "end": "--",
    }
    assert line | expected == line
    assert line["replica"] == "127.0.0.1"
    assert line["total_ms"] >= line["answer_ms"] >= 0


@pytest.mark.parametrize("given", [None, 'a"quote', "a b", "x" * 129, ""])
def test_without_an_id_that_the_service_takes_the_proxy_makes_one(running: Proxy, given: str | None) -> None:
    answer = httpx.get(f"{running.api}/model", headers={} if given is None else {"X-Request-ID": given})
    made = answer.json()["request_id"]
    assert re.fullmatch(r"[0-9a-f-]{36}", made)
    assert answer.headers["X-Request-ID"] == made
    wait_until(lambda: len(running.lines(made)) == 1)


@pytest.mark.parametrize(("path", "status", "code"), [("/lost", 502, "replica_lost"), ("/metrics", 404, "not_found")])
def test_the_proxys_own_errors_carry_the_id(running: Proxy, path: str, status: int, code: str) -> None:
    answer = httpx.get(running.api + path, headers={"X-Request-ID": f"to{path}"})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.headers["X-Request-ID"] == f"to{path}"
    body = answer.json()
    assert (body["code"], body["status"], body["request_id"]) == (code, status, f"to{path}")


def test_a_body_that_is_too_large_is_refused_with_the_id(running: Proxy) -> None:
    connection = http.client.HTTPConnection(running.api.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", "/detect")
    connection.putheader("Content-Length", str(30 * 2**20))
    connection.putheader("X-Request-ID", "large")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)["request_id"]) == (413, "large")
    connection.close()


def test_below_v2_errors_are_as_its_clients_read_them_and_bodies_as_large_as_a_batchs(running: Proxy) -> None:
    def post(path: str, size: int) -> httpx.Response:
        connection = http.client.HTTPConnection(running.api.removeprefix("http://"), timeout=10)
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        answer = connection.getresponse()
        return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())

    for path, media_type in (("/v2/models/m/infer", "application/json"), ("/detect", "application/problem+json")):
        refused = post(path, 256 * 2**20)
        assert (refused.status_code, refused.headers["content-type"]) == (413, media_type)
        assert refused.json()["error"] == refused.json()["detail"]
    accepted = httpx.post(f"{running.api}/v2/models/m/infer", content=bytes(28 * 2**20), timeout=60)
    assert accepted.status_code == 200


def test_probes_are_logged_only_when_they_fail(running: Proxy) -> None:
    for path in ("/readyz", "/healthz", "/model"):
        httpx.get(running.api + path, headers={"X-Request-ID": f"probe{path}"})
    wait_until(lambda: bool(running.lines("probe/model")))
    assert [line["path"] for line in running.lines("probe")] == ["/model"]


def test_prometheus_can_tell_the_proxys_failures_from_the_replicas(running: Proxy) -> None:
    def failures(of: str) -> float:
        text = httpx.get(f"{running.operator}/metrics").text
        found = re.findall(rf'^haproxy_{of}_http_responses_total{{proxy="\w+",.*code="5xx"}} (\d+)', text, re.MULTILINE)
        return sum(map(float, found))

    before = failures("frontend"), failures("server")
    httpx.get(f"{running.api}/broken")
    assert (failures("frontend"), failures("server")) == (before[0] + 1, before[1] + 1)
    httpx.get(f"{running.api}/lost")
    assert (failures("frontend"), failures("server")) == (before[0] + 2, before[1] + 1)


def test_the_operators_port_is_not_the_apis(running: Proxy) -> None:
    assert "haproxy_" not in httpx.get(f"{running.api}/metrics").text
    assert httpx.get(f"{running.operator}/detect").status_code == 503


def test_without_a_replica_the_health_check_fails_and_clients_get_503_with_their_id(tmp_path: Path) -> None:
    with replica() as port:
        started = proxy(tmp_path, port)
        running = started.__enter__()
    try:
        wait_until(lambda: not running.has_replicas())
        answer = httpx.get(f"{running.api}/model", headers={"X-Request-ID": "nobody"})
        assert (answer.status_code, answer.json()["code"]) == (503, "not_ready")
        assert (answer.json()["request_id"], answer.headers["Retry-After"]) == ("nobody", "2")
    finally:
        started.__exit__(None, None, None)


def test_reloads_under_load_lose_no_request(tmp_path: Path) -> None:
    with replica() as port, proxy(tmp_path, port) as running, Load(running.api) as load:
        for _ in range(3):
            running.reload()
            load.wait_for_answers(50)
    assert set(load.answers) == {"200"}


def certificate(folder: Path, name: str) -> ssl.SSLContext:
    """Put a new certificate into the folder, as a renewal does; the trust of a client that knows it alone."""
    key, chain = folder / f"{name}.key", folder / f"{name}.crt"
    command = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    options = ["-keyout", str(key), "-out", str(chain), "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run([str(OPENSSL), *command.split(), *options], check=True, capture_output=True)
    (folder / "certificates").mkdir(exist_ok=True)
    (folder / "next.pem").write_text(chain.read_text() + key.read_text())
    (folder / "next.pem").rename(folder / "certificates" / "site.pem")
    return ssl.create_default_context(cafile=str(chain))


@pytest.mark.skipif(OPENSSL is None, reason="needs openssl")
def test_a_certificate_is_renewed_under_load_without_losing_a_request(tmp_path: Path) -> None:
    old = certificate(tmp_path, "old")
    with replica() as port, proxy(tmp_path, port, CERTIFICATES=f"{tmp_path}/certificates/") as running:
        assert httpx.get(f"{running.https}/model", verify=old).status_code == 200
        both = certificate(tmp_path, "new")
        both.load_verify_locations(tmp_path / "old.crt")
        with Load(running.https, verify=both) as load:
            running.reload()
            load.wait_for_answers(50)
        assert set(load.answers) == {"200"}
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.https}/model", verify=old)


@pytest.mark.skipif(OPENSSL is None, reason="needs openssl")
def test_with_certificates_plain_http_is_sent_to_https(tmp_path: Path) -> None:
    trust = certificate(tmp_path, "site")
    with replica() as port, proxy(tmp_path, port, CERTIFICATES=f"{tmp_path}/certificates/") as running:
        assert running.has_replicas()  # the health check knows nothing of TLS
        answer = httpx.post(f"{running.api}/detect?label=a", content=b"a")
        assert (answer.status_code, answer.headers["Location"]) == (308, f"{running.https}/detect?label=a")
        answer = httpx.post(f"{running.api}/detect", content=b"a", follow_redirects=True, verify=trust)
        assert answer.status_code == 200


def test_a_canary_gets_its_share_and_none_while_it_is_not_ready(tmp_path: Path) -> None:
    with replica() as port:
        with replica() as canary, proxy(tmp_path, port, CANARY_PERCENT="50", CANARY_PORT=str(canary)) as running:
            wait_until(lambda: ask_backend(running) == "canary")
            shares = Counter(ask_backend(running) for _ in range(60))
            assert min(shares["canary"], shares["replicas"]) > 10
        with proxy(tmp_path, port, CANARY_PERCENT="50", CANARY_PORT=str(canary)) as running:
            down = (
                'haproxy_backend_active_servers{proxy="canary"} 0'  # before 3.1 a server is up until its checks failed
            )
            wait_until(lambda: down in httpx.get(f"{running.operator}/metrics").text)
            assert {ask_backend(running) for _ in range(20)} == {"replicas"}


def ask_backend(running: Proxy) -> str:
    """The backend that answered one request."""
    made = httpx.get(f"{running.api}/model").headers["X-Request-ID"]
    wait_until(lambda: bool(running.lines(made)))
    return str(running.lines(made)[0]["backend"])
