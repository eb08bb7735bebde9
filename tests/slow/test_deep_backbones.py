"""The deeper backbones, exported: their files find what their checkpoints find."""

from pathlib import Path

import pytest

from model.backbones import BACKBONES
from tests.model.test_backbones import EXPORTED, assert_finds_the_same, checkpoint_and_file


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in BACKBONES if name not in EXPORTED])
def test_the_exported_file_finds_what_the_checkpoint_finds(name: str, tmp_path: Path) -> None:
    assert_finds_the_same(checkpoint_and_file(tmp_path, name))
