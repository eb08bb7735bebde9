"""Named recipes for `train` and `anchors`. A preset is the only home of its values, and every value has a flag.

A preset says what it reaches if this repository has a figure; "not measured" means that it was not trained here.
"""

from collections.abc import Mapping
from dataclasses import replace

from model.anchors import AnchorConfig
from model.metadata import ResizePolicy
from model.retinanet import RetinaNetConfig
from training.config import AugmentConfig, DetectionConfig, LossConfig, OptimiserConfig, TrainConfig

PAPER = TrainConfig()
"""Lin et al. 2017, §4.1 and §5: ResNet-50, 16 images a step, 90,000 steps.
`python -m training train --preset paper --data COCO --out runs/paper`: not measured here.
"""

TORCHVISION_V1 = replace(
    PAPER,
    model=RetinaNetConfig(p6_from="p5", anchors=AnchorConfig(stride="torchvision")),
    loss=LossConfig(box_loss="l1"),
    optimiser=OptimiserConfig(milestones=(16 / 26, 22 / 26)),
    steps=190_000,
    group_by_aspect=True,
    freeze_stages=2,
)
"""torchvision's reference recipe: 26 epochs of COCO, milestones after 16 and 22, plain L1. It decays biases too.
`python -m training train --preset torchvision-v1 --data COCO --out runs/v1`: AP not measured here; speed and memory
against torchvision's own loop: `python -m tests.benchmarks.training`.
"""

TORCHVISION_V2 = replace(
    TORCHVISION_V1,
    model=RetinaNetConfig(backbone_norm="batch", head_norm="group", anchors=AnchorConfig(stride="torchvision")),
    loss=LossConfig(box_loss="giou"),
    optimiser=replace(TORCHVISION_V1.optimiser, optimiser="adamw", learning_rate=1e-4, weight_decay=0.05),
    augment=AugmentConfig(shorter_sides=tuple(range(480, 801, 32))),
)
"""torchvision's second recipe: AdamW, trained batch norm, GroupNorm in the heads, GIoU, shorter sides 480 to 800.
`python -m training train --preset torchvision-v2 --data COCO --out runs/v2`: not measured here.
"""

DETECTRON2_3X = replace(
    PAPER,
    loss=LossConfig(box_loss="l1", normaliser="running"),
    optimiser=OptimiserConfig(milestones=(210 / 270, 250 / 270)),
    augment=AugmentConfig(shorter_sides=tuple(range(640, 801, 32))),
    steps=270_000,
    group_by_aspect=True,
    freeze_stages=2,
)
"""detectron2's RetinaNet R50 3x, on torchvision's backbone weights: shorter sides 640 to 800, smooth-L1 with beta 0,
losses over the running mean of the positives.
`python -m training train --preset detectron2-3x --data COCO --out runs/3x`: not measured here.
"""

PROPOSAL_LOSS = LossConfig(
    fg_iou_threshold=0.7,
    bg_iou_threshold=0.3,
    border_anchors="ignored",
    sampled_anchors=256,
    focal_alpha=-1.0,
    focal_gamma=0.0,
    normaliser="anchors",
)
"""The region proposal network's loss: cross-entropy on 256 sampled anchors (Ren et al. 2015 §3.1.2, §3.1.3)."""
PROPOSALS = DetectionConfig(score_threshold=0.0, nms_threshold=0.7, max_detections=1000)

RPN = replace(
    PAPER,
    model=RetinaNetConfig(
        p6_from="pool", head="shared", head_convs=1, anchors=AnchorConfig(scales=(1.0,), lowest_level=2)
    ),
    loss=PROPOSAL_LOSS,
    optimiser=OptimiserConfig(learning_rate=0.02, milestones=(30 / 40,)),
    detection=PROPOSALS,
    steps=40_000,
    class_agnostic=True,
)
"""Lin et al. 2017, Feature Pyramid Networks, §5.1: proposals, 16 images a step, 40,000 steps.
`python -m training train --preset rpn --data COCO --out runs/rpn`, then `python -m training evaluate --class-agnostic`:
not measured at this size; as an ablation, on small pictures, 1,000 proposals find 0.568 of the objects
(docs/ablations.md).
"""

DEMO = TrainConfig(
    model=RetinaNetConfig(
        backbone="resnet18",
        backbone_width=0.375,
        backbone_norm="batch",
        fpn_channels=64,
        head_channels=64,
        head_convs=2,
        head_norm="batch",
        anchors=AnchorConfig(base_sizes=(20, 40, 80, 160, 320)),
    ),
    loss=LossConfig(box_loss="giou", normaliser="batch"),
    optimiser=OptimiserConfig(
        optimiser="adamw",
        learning_rate=1.5e-3,
        reference_batch_size=8,
        weight_decay=0.03,
        warmup_steps=200,
        schedule="cosine",
        gradient_clip=10.0,
        ema_decay=0.9985,
        freeze_batch_norm_from=0.75,
    ),
    augment=AugmentConfig(
        vertical_flip=0.5,
        transpose=0.5,
        scale_jitter=(0.6, 1.3),
        crop_sizes=(384, 544, 672),
        crop_batch_sizes=(6, 3, 2),
        crop_probabilities=(0.3, 0.3, 0.4),
        crop_on_object=0.7,
        shuffle_channels=0.5,
    ),
    steps=8000,
    batch_size=8,
    checkpoint_every=100,
    evaluate_every=1500,
    evaluate_images=60,
    pretrained_backbone=False,
)
"""The demo model, small enough to be trained from scratch on two cores, on crops at the served scale.
`make demo-model` is not measured as a whole. The shipped model took seven runs of 20,800 steps together and the mean of
the last three, and has AP 0.853 (docs/training-log.md).
"""

SMALL = replace(
    DEMO,
    optimiser=replace(DEMO.optimiser, learning_rate=2e-3, warmup_steps=50, ema_decay=0.99),
    augment=AugmentConfig(
        vertical_flip=0.5,
        transpose=0.5,
        shorter_sides=(320,),
        scale_jitter=(0.75, 1.3),
        crop_sizes=(320,),
        crop_batch_sizes=(8,),
        crop_probabilities=(1.0,),
        brightness=0.1,
        contrast=0.1,
    ),
    resize=ResizePolicy(shorter_side=320, longest_side=533),
    steps=600,
    evaluate_every=300,
    evaluate_images=0,
)
"""A recipe for a few hundred annotated pictures, fine-tuned from the demo model's checkpoint on crops at 320 px.
`python -m training train --preset small --init model/pretrained/shapes.pt --data BCCD --out runs/bccd`: AP 0.601 and
AP50 0.923 on BCCD's 72 test pictures, means of three seeds (docs/training-log.md).
"""

ABLATION = replace(
    DEMO,
    model=replace(
        DEMO.model,
        backbone_width=0.25,
        fpn_channels=32,
        head_channels=32,
        anchors=AnchorConfig(base_sizes=(8, 16, 32, 64, 128)),
    ),
    loss=replace(DEMO.loss, box_loss="smooth_l1"),
    optimiser=replace(DEMO.optimiser, learning_rate=3e-3, warmup_steps=50, ema_decay=0.98),
    augment=AugmentConfig(
        vertical_flip=0.5,
        shorter_sides=(256,),
        crop_sizes=(256,),
        crop_batch_sizes=(8,),
        crop_probabilities=(1.0,),
        crop_on_object=0.5,
    ),
    resize=ResizePolicy(shorter_side=256, longest_side=427),
    steps=500,
    log_every=1,
    evaluate_every=0,
    evaluate_images=0,
    class_agnostic=True,
)
"""The baseline of the ablations, a few minutes on two cores. It has one class: a detector first learns to find objects.
`make ablations`: AP 0.229 on 150 validation pictures (docs/ablations.md).
"""

PRESETS: Mapping[str, TrainConfig] = {
    "paper": PAPER,
    "torchvision-v1": TORCHVISION_V1,
    "torchvision-v2": TORCHVISION_V2,
    "detectron2-3x": DETECTRON2_3X,
    "rpn": RPN,
    "demo": DEMO,
    "small": SMALL,
    "ablation": ABLATION,
    "article": ABLATION,  # the name that it had
}
