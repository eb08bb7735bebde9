"""Every line that docs/operations.md and docs/runbook.md tell an operator to type, run on an engine in their order.

`python -m tests.deploy.engine.day > docs/operators-day.md` writes the page of their outputs, `test_day.py` runs them as
a test. The lines are the page's; `HERE` is what differs where there is neither a GPU nor Grafana's image.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.deploy.engine.stack import ROOT, run
from tests.support.load import free_ports
from tests.support.serving import picture
from tests.support.tiny_model import write_tiny_model

NO_GRAFANA = "services: {grafana: {profiles: [not-here]}}\n"
FILES = ("docker-compose.yml", "docker/cpu.yml", "no-grafana.yml")
A_REPLICA = "$(docker compose ps --quiet service | head -n 1)"
HERE = (
    ("retinaserve:gpu", "retinaserve:cpu"),
    ("REPLICA", A_REPLICA),
    ("CONTAINER", A_REPLICA),
    ("-f docker-compose.yml -f docker/cpu.yml", "-f docker-compose.yml"),
    ("-f docker-compose.yml", " ".join(f"-f {name}" for name in FILES)),
)
MAX_LINES, MAX_CHARACTERS = 10, 200
"""Length of an output on the page."""
PROGRESS = re.compile(r" *(Container|Network|Volume) .*|#\d+ .*|\s*$")
"""Progress lines of Compose and of docker build."""
CONTROLS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
LEFT_OUT = ("alertmanager", "docker/alerting.yml", "hooks.example")
"""Words of lines that need an image which may be missing; test_operations.py has a test for those lines."""
OF_OTHERS = ("## Kubernetes", "## The images", "## A day")
"""Headings at which the lines for this engine end."""
INLINE = re.compile(r"`(docker (?:compose (?!kill)\S+|exec|logs|events|restart|start) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """The lines of one fence, below their heading."""

    heading: str
    lines: tuple[str, ...]


NEW_VERSION = Block("A new version of the program, or new settings", ("echo '# another version' >> docker/ready.py",))


def blocks(page: str) -> Iterator[Block]:
    """Find the shell lines of the page, without what this engine cannot run."""
    page = re.split("|".join(map(re.escape, OF_OTHERS)), page)[0]
    for section in re.split(r"^#+ ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        for fence in re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL):
            lines = tuple(line for line in fence.splitlines() if not any(words in line for words in LEFT_OUT))
            if lines:
                yield Block(heading, lines)


@dataclass(frozen=True)
class Day:
    """A checkout with what an operator brings along: two models, a certificate, a picture."""

    folder: Path
    port: int
    prometheus_port: int
    https_port: int

    @property
    def environment(self) -> dict[str, str]:
        return os.environ | {
            "COMPOSE_PROJECT_NAME": "retinaserve-day",
            "COMPOSE_FILE": ":".join(FILES),
            "RETINASERVE_MODEL": "/models/current.onnx",
            "API_PORT": str(self.port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "HTTPS_PORT": str(self.https_port),
        }

    def prepare(self) -> None:
        archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "-x", "-C", str(self.folder)], input=archive, check=True)
        (self.folder / "no-grafana.yml").write_text(NO_GRAFANA)
        for number in (1, 2):
            write_tiny_model(self.folder / f"detector-{number}.onnx", name=f"detector-{number}", seed=number)
        (self.folder / "photo.jpg").write_bytes(picture(kind="JPEG"))
        options = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=detector.example"
        pair = ("-keyout", "privkey.pem", "-out", "fullchain.pem")
        run("openssl", *options.split(), *pair, cwd=self.folder)

    def here(self, line: str) -> str:
        for words, others in HERE:
            line = line.replace(words, others)
        return line.replace("localhost:8000", f"localhost:{self.port}")

    def type(self, *lines: str) -> tuple[int, str]:
        """Run lines in one shell that stops at the first that fails: the exit code, and what an operator sees."""
        script = "\n".join(map(self.here, lines))
        shell = ["bash", "-e", "-o", "pipefail", "-c", script]
        done = subprocess.run(
            shell, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        return done.returncode, done.stdout


def steps(page: str, runbook: str) -> Iterator[Block]:
    """Begin with what the page has in its tables, go through its fences, and through the lines of the runbook."""
    for line in (
        "cp detector-1.onnx models/ && ln -sfn detector-1.onnx models/current.onnx",
        "docker compose up --detach --wait",
        "curl -sS -F image=@photo.jpg -H 'X-Request-ID: ID' http://localhost:8000/detect",
    ):
        yield Block("Start", (line,))
    for block in blocks(page):
        yield from [NEW_VERSION] * (block.heading == NEW_VERSION.heading)
        yield block
    for line in dict.fromkeys(INLINE.findall(" ".join(runbook.split()))):
        yield Block("The runbook", (line,))
    yield Block("Stop", ("docker compose down --volumes --remove-orphans",))


def live(day: Day) -> Iterator[tuple[Block, int, str]]:
    """Run every step; the shell's functions hold within a fence."""
    for block in steps(*((ROOT / "docs" / name).read_text() for name in ("operations.md", "runbook.md"))):
        yield block, *day.type(*block.lines)


def main() -> int:
    """Write the page."""
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        day = Day(Path(folder), *free_ports(3))
        day.prepare()
        sys.stdout.write(HEAD)
        heading = ""
        for block, code, output in live(day):
            if block.heading != heading:
                heading = block.heading
                sys.stdout.write(f"\n## {heading}\n")
            typed = "".join(f"$ {line}\n" for line in block.lines)
            sys.stdout.write(f"```\n{typed}{shortened(output.replace(folder, '.'))}```\n")
            sys.stdout.write(f"Exit code {code}.\n" if code else "")
            sys.stdout.flush()
            failed |= code
    return failed


def shortened(output: str) -> str:
    """The last lines, and the beginning of each."""
    lines = [line for line in CONTROLS.sub("", output).splitlines() if not PROGRESS.match(line)]
    shown = ["…"] * (len(lines) > MAX_LINES) + lines[-MAX_LINES:]
    return "".join(line[:MAX_CHARACTERS] + "…" * (len(line) > MAX_CHARACTERS) + "\n" for line in shown)


HEAD = """# An operator's day

This page shows what the lines of [operations.md](operations.md) and [runbook.md](runbook.md) print. They were run in
order on one Docker engine without a GPU. Lines for Alertmanager and Grafana are left out, because their images were
not there. `python -m tests.deploy.engine.day > docs/operators-day.md` makes this page; `make docker-test` runs the
same lines.
"""

if __name__ == "__main__":
    sys.exit(main())
