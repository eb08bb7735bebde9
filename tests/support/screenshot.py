"""Writes docs/figures/playground.png: the playground with its example, as the README shows it.

python -m tests.support.screenshot
"""

import io
import tempfile
from pathlib import Path

from PIL import Image

from model.pretrained import PRETRAINED
from tests.support.browser import Playground, chromium
from tests.support.serving import server_process

FILE = Path(__file__).parents[2] / "docs" / "figures" / "playground.png"
SIZE = {"width": 1240, "height": 860}


def take() -> bytes:
    """Return the page with the boxes of its example, as PNG."""
    with (
        tempfile.TemporaryDirectory() as folder,
        server_process(Path(folder), model_path=PRETRAINED) as server,
        chromium() as browser,
    ):
        page = browser.new_page(viewport=SIZE, color_scheme="light")  # type: ignore[arg-type]
        playground = Playground(page, f"{server.url}/")
        playground.open()
        playground.use_example()
        playground.slide("Score threshold", 0.55)  # after which the status tells no time, which would be this machine's
        page.mouse.move(0, 0)
        shot = page.screenshot()
        playground.close()
    return shot


if __name__ == "__main__":
    with Image.open(io.BytesIO(take())) as shot:
        shot.convert("RGB").quantize(256).save(FILE, optimize=True)  # a third of the bytes
    print(f"{FILE}: {FILE.stat().st_size / 1000:.0f} kB")
