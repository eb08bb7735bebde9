"""Import of torchvision's RetinaNet weights into a checkpoint of ours, which evaluates and exports like any other.

In:  the state dict of a `retinanet_resnet50_fpn` or `_v2`, from a file or by torchvision's own download and cache.
     Both key layouts are read: in the older one the convolutions of heads and pyramid have no inner index.
Out: the checkpoint; nothing is written before every name and shape fits.

A column of the classification layer is a class id, as in torchvision's training: column 0 is its background, whose
score torchvision reports like any other, and so do we. COCO's ids therefore stay the same, with their gaps.

The official v1 weights need a batch-norm epsilon of 0: they were trained before frozen batch norm had one.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor
from torchvision.models.detection import RetinaNet_ResNet50_FPN_V2_Weights, RetinaNet_ResNet50_FPN_Weights

from model.anchors import AnchorConfig
from model.metadata import Label
from model.retinanet import RetinaNet, RetinaNetConfig
from training.checkpoint import Checkpoint
from training.config import TrainConfig, override
from training.exchange.weights_file import InvalidWeights, read_state

log = logging.getLogger(__name__)
COCO = "coco"
"""Name of torchvision's own weights, trained on COCO train2017, in place of a file."""
NORM_EPSILON = 1e-5
LOGITS_BIAS = "head.classification_head.cls_logits.bias"
NAMED_PROBLEMS = 3
"""Most mismatches that an error names."""


@dataclass(frozen=True)
class Architecture:
    model: RetinaNetConfig
    published: Any
    """torchvision's enum member of the COCO weights: URL, names of the columns, AP."""
    published_epsilon: float

    @property
    def published_file(self) -> str:
        return Path(urlparse(self.published.url).path).name


ARCHITECTURES = {
    "retinanet_resnet50_fpn": Architecture(
        RetinaNetConfig(backbone_norm="frozen", p6_from="p5", anchors=AnchorConfig(stride="torchvision")),
        RetinaNet_ResNet50_FPN_Weights.COCO_V1,
        published_epsilon=0.0,
    ),
    "retinanet_resnet50_fpn_v2": Architecture(
        RetinaNetConfig(backbone_norm="batch", head_norm="group", anchors=AnchorConfig(stride="torchvision")),
        RetinaNet_ResNet50_FPN_V2_Weights.COCO_V1,
        published_epsilon=NORM_EPSILON,
    ),
}


def import_weights(
    name: str,
    weights: str,
    *,
    label_file: Path | None = None,
    norm_epsilon: float | None = None,
    flags: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Make a checkpoint of `weights` (COCO or a file's path) for one of ARCHITECTURES.

    norm_epsilon  epsilon of the backbone's batch norm; None: 0 for the published v1 file (by its name), else 1e-5
    flags         values of anchors and resize, by name, that differ from the architecture's; None counts as absent
    InvalidWeights: the weights cannot be read or do not fit, or the labels do not fit them.
    """
    architecture = ARCHITECTURES[name]
    is_published = weights == COCO or Path(weights).name == architecture.published_file
    if norm_epsilon is None:
        norm_epsilon = architecture.published_epsilon if is_published else NORM_EPSILON
    model = replace(architecture.model, norm_epsilon=norm_epsilon)
    whole = override(TrainConfig(model=model), flags or {})
    config = whole.model
    state = {key: _single(value) for key, value in renamed(_load(architecture, weights)).items()}
    if config.backbone_norm == "frozen":  # it counts no batches; weights trained with live batch norm did
        state = {key: value for key, value in state.items() if not key.endswith(".num_batches_tracked")}
    num_columns = _check_fit(state, config, f"{weights} does not fit {name}")
    labels = read_labels(label_file, num_columns) if label_file else _coco_labels(architecture, num_columns)
    if not is_published:
        anchors = f"base sizes {config.anchors.base_sizes}, aspect ratios {config.anchors.aspect_ratios}"
        log.warning("a state dict does not hold anchors and resize; %s and %s are assumed", anchors, whole.resize)
    log.info("%s: %d columns, batch-norm epsilon %g", weights, num_columns, norm_epsilon)
    return Checkpoint(
        config=whole,
        labels=labels,
        model=state,
        ap=architecture.published.meta["_metrics"]["COCO-val2017"]["box_map"] / 100 if is_published else None,
        data_set="COCO train2017" if is_published else "",
        training={"imported": f"{architecture.published_file if is_published else Path(weights).name} ({name})"},
    )


def _single(value: Tensor) -> Tensor:
    """Convert to single precision, if it has another."""
    return value.float() if value.is_floating_point() else value


def renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename from either layout to the newer one."""
    return {_renamed(key): value for key, value in state.items()}


def _renamed(key: str) -> str:
    key = re.sub(r"(\.fpn\.(?:inner|layer)_blocks\.\d)\.(weight|bias)$", r"\1.0.\2", key)
    # the old heads were one flat sequence of convolutions and ReLUs: every second entry has weights
    return re.sub(
        r"^(head\.\w+\.conv)\.(\d)\.(weight|bias)$",
        lambda found: f"{found[1]}.{int(found[2]) // 2}.0.{found[3]}",
        key,
    )


def read_labels(file: Path, num_columns: int) -> tuple[Label, ...]:
    """Read a name for every column, from one of two formats.

    COCO's JSON: the `categories` name the columns of their ids; a column without one is called N/A.
    Text: line n (from 0) names column n; there are as many lines as columns.
    Repeated names get their column's number. InvalidWeights: the file has neither format, or does not fit.
    """
    try:
        text = file.read_text(encoding="utf-8")
        names = _category_names(json.loads(text), num_columns) if file.suffix == ".json" else text.splitlines()
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidWeights(f"{file} holds no labels: {error!r}") from error
    if len(names) != num_columns:
        raise InvalidWeights(f"{file} names {len(names)} columns, the weights have {num_columns} (column 0 included)")
    return _labels(names)


def _category_names(content: Any, num_columns: int) -> list[str]:
    names = {int(category["id"]): str(category["name"]) for category in content["categories"]}
    return [names.get(column, "N/A") for column in range(max([num_columns, *(column + 1 for column in names)]))]


def _coco_labels(architecture: Architecture, num_columns: int) -> tuple[Label, ...]:
    names = architecture.published.meta["categories"]
    if len(names) != num_columns:
        raise InvalidWeights(f"the weights have {num_columns} columns, COCO {len(names)}: name them with --labels FILE")
    return _labels(names)


def _labels(names: Sequence[str]) -> tuple[Label, ...]:
    count = Counter(names)
    return tuple(Label(column, name if count[name] == 1 else f"{name} {column}") for column, name in enumerate(names))


def _load(architecture: Architecture, weights: str) -> Mapping[str, Tensor]:
    if weights != COCO:
        return read_state(Path(weights), LOGITS_BIAS)
    try:
        state = architecture.published.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InvalidWeights(f"{architecture.published.url} cannot be read: {error}") from error
    assert isinstance(state, Mapping)
    return state


def _check_fit(state: Mapping[str, Tensor], config: RetinaNetConfig, failure: str) -> int:
    """Return the number of classes. InvalidWeights: a name or a shape is not the network's."""
    if LOGITS_BIAS not in state:
        raise InvalidWeights(f"{failure}: it lacks {LOGITS_BIAS}")
    num_columns = max(1, state[LOGITS_BIAS].numel() // config.level_anchors.per_cell)
    with torch.device("meta"):  # shapes without numbers
        expected = RetinaNet(config, num_columns).state_dict()
    problems = [f"it lacks {key}" for key in expected if key not in state]
    problems += [f"it has {key}" for key in state if key not in expected]
    problems += [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f"; and {len(problems) - NAMED_PROBLEMS} more" if len(problems) > NAMED_PROBLEMS else ""
        raise InvalidWeights(f"{failure}: {'; '.join(problems[:NAMED_PROBLEMS])}{more}")
    return num_columns
