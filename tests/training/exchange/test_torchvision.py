"""Importing torchvision's weights: layouts, labels, refusals. That the numbers agree too is test_parity.py's."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from model.metadata import Label
from training.__main__ import main
from training.checkpoint import build_detector, load_checkpoint
from training.exchange.torchvision import import_weights, read_labels, renamed

V1, V2 = "retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2"
PUBLISHED = {V1: "retinanet_resnet50_fpn_coco-eeacb38b.pth", V2: "retinanet_resnet50_fpn_v2_coco-5905b1c5.pth"}


def torchvisions(arch: str, num_classes: int = 91) -> nn.Module:
    """On the meta device: shapes without numbers."""
    with torch.device("meta"):
        network = getattr(torchvision.models.detection, arch)(
            weights=None, weights_backbone=None, num_classes=num_classes
        )
    assert isinstance(network, nn.Module)
    return network


def state_of(network: nn.Module) -> dict[str, Tensor]:
    """Every tensor one repeated number, another for each: small in a file."""
    state = network.state_dict()
    return {key: torch.tensor(float(i)).expand(value.shape) for i, (key, value) in enumerate(state.items())}


def in_older_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    older = {re.sub(r"(_blocks\.\d)\.0\.", r"\1.", key): value for key, value in state.items()}
    return {
        re.sub(r"(head\.\w+\.conv)\.(\d)\.0\.", lambda m: f"{m[1]}.{2 * int(m[2])}.", key): value
        for key, value in older.items()
    }


def saved(state: object, folder: Path, name: str = "weights.pth") -> str:
    torch.save(state, folder / name)
    return str(folder / name)


def test_the_older_layout_is_read_as_torchvision_reads_it() -> None:
    network = torchvisions(V1)
    state = state_of(network)
    older = in_older_layout(state)
    assert "head.regression_head.conv.6.bias" in older and "backbone.fpn.layer_blocks.2.weight" in older
    network.load_state_dict(dict(older), strict=True, assign=True)
    theirs, ours = network.state_dict(), renamed(older)
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("arch", [V1, V2])
def test_the_newer_layout_keeps_its_names(arch: str) -> None:
    state = state_of(torchvisions(arch))
    assert renamed(state) == state


def test_v1_is_imported_with_frozen_batch_norm_whichever_kind_it_was_trained_with(tmp_path: Path) -> None:
    trained_live = state_of(torchvisions(V1))
    frozen = {key: value for key, value in trained_live.items() if "num_batches_tracked" not in key}
    assert (len(trained_live), len(frozen)) == (354, 301)
    for state in (trained_live, frozen, in_older_layout(frozen)):
        checkpoint = import_weights(V1, saved(state, tmp_path))
        assert set(checkpoint.model) == set(frozen)
        assert checkpoint.config.model.backbone_norm == "frozen"
        assert (checkpoint.config.model.norm_epsilon, checkpoint.ap, checkpoint.data_set) == (1e-5, None, "")
        build_detector(checkpoint)


@pytest.mark.parametrize(("arch", "epsilon", "ap"), [(V1, 0.0, 0.364), (V2, 1e-5, 0.415)])
def test_coco_weights_come_from_torchvisions_cache(
    arch: str, epsilon: float, ap: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    saved(state_of(torchvisions(arch)), cache, PUBLISHED[arch])
    out = tmp_path / "new folder" / "coco.pt"
    assert main(["import", "--arch", arch, "--weights", "coco", "--out", str(out)]) == 0
    checkpoint = load_checkpoint(out)
    assert (checkpoint.config.model.norm_epsilon, checkpoint.ap, checkpoint.data_set) == (epsilon, ap, "COCO train2017")
    assert checkpoint.config.model.anchors.stride == "torchvision"
    assert [label.class_id for label in checkpoint.labels] == list(range(91))
    assert len({label.label for label in checkpoint.labels}) == 91
    named = {label.class_id: label.label for label in checkpoint.labels}
    assert [named[i] for i in (0, 1, 12, 18, 90)] == ["__background__", "person", "N/A 12", "dog", "toothbrush"]
    build_detector(checkpoint)


def test_the_published_v1_file_is_known_by_its_name(tmp_path: Path) -> None:
    weights = saved(state_of(torchvisions(V1)), tmp_path, PUBLISHED[V1])
    assert import_weights(V1, weights).config.model.norm_epsilon == 0
    assert import_weights(V1, weights, norm_epsilon=1e-3).config.model.norm_epsilon == 1e-3


def test_a_fine_tuned_model_brings_its_labels(tmp_path: Path) -> None:
    weights = saved(state_of(torchvisions(V2, num_classes=4)), tmp_path)
    (tmp_path / "names.txt").write_text("background\ncat\ndog\ncat\n")
    out = tmp_path / "pets.pt"
    arguments = ["--labels", str(tmp_path / "names.txt"), "--norm-eps", "0.001"]
    assert main(["import", "--arch", V2, "--weights", weights, "--out", str(out), *arguments]) == 0
    checkpoint = load_checkpoint(out)
    assert checkpoint.labels == (Label(0, "background"), Label(1, "cat 1"), Label(2, "dog"), Label(3, "cat 3"))
    assert checkpoint.config.model.norm_epsilon == 0.001


def test_coco_json_names_the_columns_of_its_ids(tmp_path: Path) -> None:
    file = tmp_path / "instances_val.json"
    file.write_text(json.dumps({"categories": [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}], "images": []}))
    assert [label.label for label in read_labels(file, 4)] == ["N/A 0", "cat", "N/A 2", "dog"]
    assert [label.label for label in read_labels(file, 5)] == ["N/A 0", "cat", "N/A 2", "dog", "N/A 4"]


def refusal(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that the command says."""
    assert main(["import", *arguments]) == 2
    *_, line = capfd.readouterr().err.strip().splitlines()  # after the log's
    assert line.startswith("python -m training: error: ")
    return line


@pytest.mark.parametrize(
    ("arch", "content", "complaint"),
    [
        (V2, lambda: state_of(torchvisions(V1)), "does not fit retinanet_resnet50_fpn_v2: it lacks head.*; and "),
        (V1, lambda: state_of(torchvisions(V2)), r"does not fit retinanet_resnet50_fpn: .*; and "),
        (V1, lambda: {"fc.weight": torch.zeros(1)}, "lacks head.classification_head.cls_logits.bias"),
        (V1, lambda: {"model": {}, "epoch": 3}, r"is not a state dict, and holds none: save model.state_dict\(\)"),
        (V1, lambda: {"format": "retinaserve checkpoint 1", "model": {}}, "is a checkpoint of ours already"),
        (V1, lambda: [torch.zeros(1)], "is not a state dict"),
        (V1, lambda: state_of(torchvisions(V1, 21)), "21 columns, COCO 91: name them with --labels FILE"),
        (V1, lambda: state_of(torchvisions(V1)) | {"backbone.body.conv1.weight": torch.zeros(64, 3, 3, 3)},
         r"backbone.body.conv1.weight is \(64, 3, 3, 3\) instead of \(64, 3, 7, 7\)"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_in_one_line(
    arch: str, content: Callable[[], object], complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights, out = saved(content(), tmp_path), tmp_path / "out" / "x.pt"
    assert re.search(complaint, refusal(["--arch", arch, "--weights", weights, "--out", str(out)], capfd))
    assert not out.parent.exists()


def test_files_that_hold_no_weights_are_refused_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.pth").write_text("no weights\nhere")
    (tmp_path / "cut.pth").write_bytes(Path(saved(state_of(torchvisions(V1)), tmp_path)).read_bytes()[:5000])
    for name, complaint in [
        ("text.pth", "not a readable state dict"),
        ("cut.pth", "cut.pth cannot be read"),
        ("none.pth", "No such file"),
    ]:
        arguments = ["--arch", V1, "--weights", str(tmp_path / name), "--out", str(tmp_path / "x.pt")]
        assert complaint in refusal(arguments, capfd)
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("short.txt", "a\nb\n", r"names 2 columns, the weights have 3 \(column 0 included\)"),
        ("beyond.json", '{"categories": [{"id": 7, "name": "x"}]}', "names 8 columns, the weights have 3"),
        ("no.json", "{}", "no.json holds no labels"),
        ("broken.json", "{", "broken.json holds no labels"),
    ],
)
def test_labels_that_do_not_fit_are_refused_in_one_line(
    name: str, content: str, complaint: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    arguments = ["--arch", V1, "--weights", saved(state_of(torchvisions(V1, 3)), tmp_path)]
    arguments += ["--labels", str(tmp_path / name), "--out", str(tmp_path / "x.pt")]
    assert re.search(complaint, refusal(arguments, capfd))
    assert not (tmp_path / "x.pt").exists()


def test_without_a_network_the_failed_download_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    assert main(["import", "--arch", V1, "--weights", "coco", "--out", str(tmp_path / "x.pt")]) == 2
    assert f"{PUBLISHED[V1]} cannot be read: " in capfd.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "x.pt").exists()


def test_anchors_and_resize_are_taken_where_they_differ_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    weights = {f"module.{key}": value.half() for key, value in state_of(torchvisions(V1)).items()}
    flags = {"base_sizes": [16.0, 32.0, 64.0, 128.0, 256.0], "shorter_side": 400, "longest_side": 600, "scales": None}
    checkpoint = import_weights(V1, saved({"model": weights, "epoch": 3}, tmp_path), flags=flags)
    assert checkpoint.config.model.anchors.base_sizes == (16, 32, 64, 128, 256)
    assert checkpoint.config.model.anchors.stride == "torchvision"
    assert (checkpoint.config.resize.shorter_side, checkpoint.config.resize.longest_side) == (400, 600)
    assert {value.dtype for value in checkpoint.model.values()} == {torch.float32}
    assert "a state dict does not hold anchors and resize; base sizes (16.0, 32.0" in caplog.text
