from typing import Any

import numpy as np

from model.runtime.cpu import AnyShape
from model.types import CanvasImage


def test_a_single_canvas_is_not_copied_on_its_way_into_the_session() -> None:
    class Keeping:
        def run(self, output_names: None, input_feed: dict[str, Any]) -> list[np.ndarray]:
            self.images = input_feed["images"]
            return []

    session = Keeping()
    image = CanvasImage.uniform((64, 64), 1)
    AnyShape(session)([image])
    assert np.shares_memory(session.images, image.pixels)
