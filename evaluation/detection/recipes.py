"""The papers' detection recipes as frozen records, every value with its source."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from evaluation.fine_tuning.schedule import Schedule

__all__ = ["RECIPES", "HeadKind", "MetricStyle", "Recipe", "RecipeName"]

HeadKind = Literal["c4", "fpn"]
MetricStyle = Literal["coco", "voc"]
RecipeName = Literal["rendered", "voc07", "voc0712", "coco_c4", "coco_c4_2x", "coco_fpn", "camtrast"]


@dataclass(frozen=True)
class Recipe:
    """How a detector is built, trained and scored. What is not listed has detectron2's default.

    Attributes:
        schedule: of training.
        head: c4 (the last stage runs on every region) or fpn (feature pyramid).
        masks: Mask R-CNN instead of Faster R-CNN.
        metric: coco (101 recall points, crowds) or voc (the 11-point rule of VOC2007, difficult objects).
        train_sides: short side of a training image in pixels, one is drawn for each.
        test_side: short side of a scored image.
        max_side: the long side is at most this, so the short one may be shorter.
        square: resize to side x side whatever the proportions.
        anchors: sides in pixels, for c4; fpn has 8 times the stride of each level, detectron2's 32 to 512.
        rpn_samples: anchors sampled per image.
        roi_samples: regions sampled per image.
        pre_nms: best proposals per level before suppression, training and test.
        post_nms: and after it.
        pooler_side: cells of a pooled region; the last stage of c4 halves them.
        precise_bn_iterations: training batches over which BatchNorm's statistics are averaged before scoring.
        source: where the values are from.
    """

    schedule: Schedule
    head: HeadKind
    masks: bool
    metric: MetricStyle
    train_sides: tuple[int, ...]
    test_side: int
    source: str
    max_side: int = 1333
    square: bool = False
    anchors: tuple[int, ...] = (32, 64, 128, 256, 512)
    rpn_samples: int = 256
    roi_samples: int = 512
    pre_nms: tuple[int, int] = (12_000, 6_000)
    post_nms: tuple[int, int] = (2_000, 1_000)
    pooler_side: int = 14
    precise_bn_iterations: int = 200

    def with_side(self, side: int) -> Recipe:
        """Another short side for training and test; anchors and the longest side keep their proportion to it."""
        scale = side / self.test_side
        return replace(
            self,
            train_sides=(side,),
            test_side=side,
            max_side=round(self.max_side * scale),
            anchors=tuple(max(1, round(anchor * scale)) for anchor in self.anchors),
        )

    def with_head(self, head: HeadKind) -> Recipe:
        """The other kind of detector, with detectron2's numbers for it (or the recipe's own where they are smaller)."""
        if head == self.head:
            return self
        if head == "c4":
            return replace(self, head=head, pre_nms=(12_000, 6_000), post_nms=(2_000, 1_000), pooler_side=14)
        return replace(
            self,
            head=head,
            pre_nms=(min(self.pre_nms[0], 2_000), min(self.pre_nms[1], 1_000)),
            post_nms=(min(self.post_nms[0], 1_000), min(self.post_nms[1], 1_000)),
            pooler_side=7,
        )


def _moco_schedule(iterations: int, milestones: tuple[int, int], warmup: int) -> Schedule:
    """16 images, SGD 0.02, a tenth at each milestone; detectron2's momentum, weight decay and warm-up factor."""
    return Schedule(
        iterations=iterations,
        batch_size=16,
        learning_rate=0.02,
        weight_decay=1e-4,
        warmup_iterations=warmup,
        decay="steps",
        milestones=milestones,
    )


_MOCO = "facebookresearch/moco: detection/configs, detection/train_net.py"
_VOC_SIDES = tuple(range(480, 801, 32))
_COCO_SIDES = tuple(range(640, 801, 32))

_VOC07 = Recipe(
    schedule=_moco_schedule(9_000, (6_000, 8_000), 100),
    head="c4",
    masks=False,
    metric="voc",
    train_sides=_VOC_SIDES,
    test_side=800,
    source=f"Zhao et al., ICLR 2021 (VOC07: 9k iterations, a tenth at 6k and 8k); all else {_MOCO}",
)

_COCO_C4 = Recipe(
    schedule=_moco_schedule(90_000, (60_000, 80_000), 1_000),
    head="c4",
    masks=True,
    metric="coco",
    train_sides=_COCO_SIDES,
    test_side=800,
    source=(
        "Zhao et al., ICLR 2021 (Mask R-CNN R50-C4, 90k iterations, a tenth at 60k and 80k); "
        f"facebookresearch/detectron2: configs/Base-RCNN-C4.yaml; {_MOCO}"
    ),
)

VOC0712_IMAGES = 16_551  # 5,011 of 2007 trainval and 11,540 of 2012 trainval
_CAMTRAST_EPOCH = round(VOC0712_IMAGES / 4)  # iterations

RECIPES: dict[str, Recipe] = {
    "rendered": Recipe(
        schedule=Schedule(
            iterations=100,
            batch_size=8,
            learning_rate=0.05,
            weight_decay=1e-4,
            warmup_iterations=10,
            warmup_factor=0.01,
            decay="cosine",
            clip_norm=5.0,
        ),
        head="c4",
        masks=False,
        metric="coco",
        train_sides=(64,),
        test_side=64,
        source="ours: one object per image, a training of about a minute on two CPU cores",
        max_side=128,
        anchors=(20, 32, 48),
        rpn_samples=64,
        roi_samples=12,
        pre_nms=(200, 100),
        post_nms=(50, 20),
        pooler_side=4,
        precise_bn_iterations=10,
    ),
    "voc07": _VOC07,
    "voc0712": replace(
        _VOC07,
        schedule=_moco_schedule(24_000, (18_000, 22_000), 100),
        source=f"{_MOCO} (pascal_voc_R_50_C4_24k_moco.yaml); Zhao et al., ICLR 2021, Table 6",
    ),
    "coco_c4": _COCO_C4,
    "coco_c4_2x": replace(
        _COCO_C4,
        schedule=_moco_schedule(180_000, (120_000, 160_000), 1_000),
        source=f"{_MOCO} (coco_R_50_C4_2x_moco.yaml)",
    ),
    "coco_fpn": replace(
        _COCO_C4.with_head("fpn"),
        source=(
            "facebookresearch/detectron2: configs/Base-RCNN-FPN.yaml and mask_rcnn_R_50_FPN_1x.yaml, with MoCo's "
            "BatchNorm, colours and strides (SL-MLP's schedule is not known)"
        ),
    ),
    "camtrast": replace(
        _VOC07,
        schedule=Schedule(
            iterations=100 * _CAMTRAST_EPOCH,
            batch_size=4,
            learning_rate=1e-4,
            optimizer="adam",
            weight_decay=5e-4,
            decay="exponential",
            gamma=0.95,
            gamma_iterations=_CAMTRAST_EPOCH,
        ),
        train_sides=(800,),
        square=True,
        source=(
            "supplement of Sun et al., AAAI 2022: ResNet-50, 800 x 800, Adam 1e-4 times 0.95 per epoch, weight decay "
            "5e-4, batch 4, 100 epochs of VOC 2007 + 2012; its AP is on the scale of AP50. The kind of head is not "
            "given: C4 as in the other VOC recipes"
        ),
    ),
}
