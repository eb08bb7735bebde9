"""Tasks of `service detect --label-studio` in a real Label Studio: imported, with their boxes, and pictures served."""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.__main__ import main
from tests.support.load import free_ports
from tests.support.serving import wait_until

PRETRAINED = Path(__file__).parents[2] / "model" / "pretrained"
PROGRAM = Path(os.environ.get("LABEL_STUDIO", "label-studio"))
TOKEN = "0123456789abcdef0123456789abcdef01234567"
START_SECONDS = 600
"""The first start makes its database: half a minute on a quiet machine."""
pytestmark = pytest.mark.timeout(900)
CONFIG = """<View><Image name="photo" value="$picture"/><RectangleLabels name="shapes" toName="photo">
<Label value="Circle"/><Label value="star"/></RectangleLabels></View>"""


@pytest.fixture(scope="module")
def label_studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Path]]:
    """A server, and the folder whose pictures it serves."""
    folder = tmp_path_factory.mktemp("label-studio")
    (folder / "files" / "photos").mkdir(parents=True)
    (folder / "files" / "photos" / "example.jpg").write_bytes((PRETRAINED / "example.jpg").read_bytes())
    [port] = free_ports(1)
    settings = {
        "LABEL_STUDIO_BASE_DATA_DIR": str(folder),
        "LABEL_STUDIO_LOCAL_FILES_SERVING_ENABLED": "true",
        "LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT": str(folder / "files"),
        "LATEST_VERSION_CHECK": "false",
        "COLLECT_ANALYTICS": "false",
        "SENTRY_DSN": "",
    }
    account = ["--username", "a@b.co", "--password", "passw0rd12", "--user-token", TOKEN, "--enable-legacy-api-token"]
    command = [str(PROGRAM), "start", "--no-browser", "--port", str(port), "--internal-host", "127.0.0.1", *account]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env=os.environ | settings, stdout=log, stderr=log)
    url, headers = f"http://127.0.0.1:{port}", {"Authorization": f"Token {TOKEN}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=120) as client:
            wait_until(lambda: process.poll() is not None or _is_up(client), START_SECONDS)
            assert process.poll() is None, (folder / "log").read_text()
            yield client, folder / "files"
    finally:
        process.terminate()
        process.wait(60)


def _is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False


def sent(answer: httpx.Response, status: int) -> dict[str, object]:
    assert answer.status_code == status, answer.text
    found: dict[str, object] = answer.json()
    return found


def test_tasks_are_imported_with_their_boxes_and_pictures(
    label_studio: tuple[httpx.Client, Path], tmp_path: Path
) -> None:
    client, files = label_studio
    (tmp_path / "project.xml").write_text(CONFIG)
    tasks = tmp_path / "tasks.json"
    flags = ["--label-config", str(tmp_path / "project.xml"), "--image-url", "/data/local-files/?d=photos/"]
    model = ["--model", str(PRETRAINED / "shapes.onnx"), "--score-threshold", "0.5"]
    assert main(["detect", str(files / "photos"), "--label-studio", str(tasks), *flags, *model]) == 0
    [written] = json.loads(tasks.read_text())

    project = sent(client.post("/api/projects", json={"title": "shapes", "label_config": CONFIG}), 201)["id"]
    storage = {"project": project, "path": str(files / "photos"), "use_blob_urls": True}
    sent(client.post("/api/storages/localfiles", json=storage), 201)
    imported = sent(client.post(f"/api/projects/{project}/import", json=[written]), 201)
    assert (imported["task_count"], imported["prediction_count"]) == (1, 1)

    [task] = client.get("/api/tasks", params={"project": project, "fields": "all"}).json()["tasks"]
    [prediction] = client.get("/api/predictions", params={"task": task["id"]}).json()
    assert prediction["model_version"] == written["predictions"][0]["model_version"]
    assert prediction["result"] == written["predictions"][0]["result"] != []
    labels = {label for region in prediction["result"] for label in region["value"]["rectanglelabels"]}
    assert labels == {"Circle", "star"}
    shown = client.get(task["data"]["picture"])
    assert shown.content == (PRETRAINED / "example.jpg").read_bytes()
