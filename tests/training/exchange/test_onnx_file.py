"""The export's changes of the network before tracing. It checks itself that the file answers as torch does."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from model.backbones import FrozenNorm, NormedConv2d
from model.folding import fold_norms
from model.retinanet import HeadLayer, RetinaNetConfig
from tests.support.background import Background
from tests.support.networks import TINY, tiny_checkpoint
from training.checkpoint import Checkpoint, build_detector, describe, load_checkpoint, save_checkpoint
from training.exchange.onnx_file import ExportFailed, check_equal, example_inputs, export

NORMED = replace(TINY, head_norm="batch", head_convs=2)


def checkpoint_with_statistics(config: RetinaNetConfig = NORMED) -> Checkpoint:
    """Each level's batch norms as different as those of a trained network."""
    checkpoint = tiny_checkpoint(config=config, lively=False)
    torch.manual_seed(1)
    weights = dict(checkpoint.model)
    for name, value in weights.items():
        if name.startswith("head.") and name.endswith("running_mean"):
            weights[name] = torch.randn_like(value) * 0.02
        elif name.startswith("head.") and name.endswith("running_var"):
            weights[name] = torch.rand_like(value) * 0.01 + 0.001
    return replace(checkpoint, model=weights)


def outputs(detector: nn.Module) -> list[torch.Tensor]:
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        levels = detector.network(images)  # type: ignore[operator]
    return [*levels.cls_logits, *levels.bbox_regression]


def test_folded_norms_answer_as_before_on_every_level() -> None:
    detector = build_detector(checkpoint_with_statistics())
    folded = fold_norms(detector)
    assert not any(isinstance(module, HeadLayer) for module in folded.modules())
    for ours, theirs in zip(outputs(folded), outputs(detector), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_without_a_norm_of_their_own_for_each_level_are_left_alone() -> None:
    detector = build_detector(tiny_checkpoint(config=replace(NORMED, head_norm="group"), lively=False))
    assert list(fold_norms(detector).network.head.state_dict()) == list(detector.network.head.state_dict())


def test_a_frozen_backbone_folds_to_plain_convolutions_that_answer_as_before() -> None:
    detector = build_detector(tiny_checkpoint(config=replace(NORMED, backbone_norm="frozen")))
    norms = [module for module in detector.modules() if isinstance(module, FrozenNorm)]
    assert norms
    for norm in norms:
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    folded = fold_norms(detector)
    assert not any(isinstance(module, NormedConv2d) for module in folded.modules())
    for ours, theirs in zip(outputs(folded), outputs(detector), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def exported(folder: Path) -> Path:
    export(checkpoint_with_statistics(), folder / "a.onnx", name="a")
    return folder / "a.onnx"


FILE = Background(exported)


@pytest.mark.slow
@pytest.mark.needs(FILE)
def test_a_head_with_batch_norms_is_convolutions_and_relus_in_the_file() -> None:
    file = FILE.result()
    graph = onnx.load(file).graph
    assert b"candidates.py" not in file.read_bytes(), "no source paths"
    consumers = {name: node for node in graph.node for name in node.input}
    heads = [node for node in graph.node if node.op_type == "Conv" and "head" in node.input[1]]
    after = Counter(consumers[node.output[0]].op_type for node in heads if "conv" in node.input[1])
    assert after == {"Relu": 2 * 2 * 5}  # subnets, layers, levels


@pytest.mark.slow
@pytest.mark.needs(FILE)
def test_a_file_that_answers_otherwise_than_torch_is_refused() -> None:
    file = FILE.result()
    detector = build_detector(checkpoint_with_statistics())
    inputs = example_inputs(1, 96, 128)
    check_equal(detector, file, "fp32", inputs)
    with torch.no_grad():
        detector.network.head.classification_head.cls_logits.weight.mul_(3)
    with pytest.raises(ExportFailed):
        check_equal(detector, file, "fp32", inputs)


def test_the_file_carries_the_threshold_that_validation_suggests(tmp_path: Path) -> None:
    for suggested in (0.375, None):
        save_checkpoint(replace(tiny_checkpoint(lively=False), suggested_score_threshold=suggested), tmp_path / "x.pt")
        assert describe(load_checkpoint(tmp_path / "x.pt"), "x", "fp32").suggested_score_threshold == suggested
