"""The recipes against the published configurations, the options, and their errors."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from evaluation.detection import task
from evaluation.detection.detectron import ShapeSpec, get_cfg
from evaluation.detection.model import detector_config
from evaluation.detection.problem import DetectionConfig, detection_problem, resolved_recipe
from evaluation.detection.recipes import RECIPES

# ---- recipes


def test_recipes_have_the_published_schedules() -> None:
    moco = {"voc07": (9_000, 6_000, 8_000, 100), "voc0712": (24_000, 18_000, 22_000, 100)}
    coco = {"coco_c4": (90_000, 60_000, 80_000, 1_000), "coco_c4_2x": (180_000, 120_000, 160_000, 1_000)}
    for name, (total, first, second, warmup) in {**moco, **coco, "coco_fpn": coco["coco_c4"]}.items():
        schedule = RECIPES[name].schedule
        assert (schedule.iterations, schedule.milestones) == (total, (first, second)), name
        assert (schedule.batch_size, schedule.learning_rate, schedule.optimizer) == (16, 0.02, "sgd"), name
        assert (schedule.momentum, schedule.weight_decay, schedule.gamma) == (0.9, 1e-4, 0.1), name
        assert (schedule.warmup_iterations, schedule.warmup_factor) == (warmup, 0.001), name
        assert schedule.decay == "steps", name
        assert RECIPES[name].precise_bn_iterations == 200, name
        assert RECIPES[name].test_side == 800, name
        assert RECIPES[name].metric == ("voc" if name in moco else "coco"), name
        assert RECIPES[name].masks == (name not in moco), name
        assert RECIPES[name].train_sides == tuple(range(480 if name in moco else 640, 801, 32)), name
    adam = RECIPES["camtrast"].schedule
    assert (adam.optimizer, adam.learning_rate, adam.weight_decay, adam.batch_size) == ("adam", 1e-4, 5e-4, 4)
    assert (adam.iterations, adam.gamma, adam.gamma_iterations) == (413_800, 0.95, 4_138)
    assert (RECIPES["camtrast"].square, RECIPES["camtrast"].train_sides) == (True, (800,))


def differing(recipe: str, names: tuple[str, ...], strides: tuple[int, ...]) -> dict[str, Any]:
    """What a recipe changes in detectron2's default configuration."""
    shapes = {name: ShapeSpec(channels=256, stride=stride) for name, stride in zip(names, strides, strict=True)}

    def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if hasattr(value, "items"):
                yield from leaves(value, f"{path}{key}.")
            else:
                yield f"{path}{key}", list(value) if isinstance(value, tuple) else value

    ours, default = (dict(leaves(c)) for c in (detector_config(RECIPES[recipe], 20, shapes), get_cfg()))
    return {key: value for key, value in ours.items() if value != default[key]}


COLOURS = {
    "MODEL.PIXEL_MEAN": pytest.approx([123.675, 116.280, 103.530]),
    "MODEL.PIXEL_STD": pytest.approx([58.395, 57.120, 57.375]),
    "INPUT.FORMAT": "RGB",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.ROI_HEADS.NUM_CLASSES": 20,
}


def test_voc_configuration_is_that_of_moco() -> None:
    assert differing("voc07", ("res4",), (16,)) == {
        **COLOURS,
        "INPUT.MIN_SIZE_TRAIN": [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800],
    }


def test_coco_configurations_are_those_of_moco_and_detectron2() -> None:
    sides = {"INPUT.MIN_SIZE_TRAIN": [640, 672, 704, 736, 768, 800], "MODEL.MASK_ON": True}
    assert differing("coco_c4", ("res4",), (16,)) == {**COLOURS, **sides}
    levels = ("p2", "p3", "p4", "p5", "p6")
    assert differing("coco_fpn", levels, (4, 8, 16, 32, 64)) == {
        **COLOURS,
        **sides,
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES": list(levels),
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 2000,
        "MODEL.RPN.PRE_NMS_TOPK_TEST": 1000,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1000,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": list(levels[:4]),
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
    }


def test_another_batch_scales_linearly() -> None:
    half = resolved_recipe(DetectionConfig("voc07", batch_size=8)).schedule
    assert (half.learning_rate, half.iterations, half.milestones) == (0.01, 18_000, (12_000, 16_000))
    assert (half.batch_size, half.warmup_iterations) == (8, 200)
    short = resolved_recipe(DetectionConfig("voc07", batch_size=8, iterations=900, learning_rate=0.5)).schedule
    assert (short.iterations, short.milestones, short.learning_rate) == (900, (600, 800), 0.5)


def test_options_replace_the_recipes_choices() -> None:
    found = resolved_recipe(DetectionConfig("coco_c4", head="fpn", masks="no", metric_style="voc", short_side=400))
    fpn = RECIPES["coco_fpn"]
    assert (found.head, found.pre_nms, found.post_nms, found.pooler_side) == (
        "fpn",
        fpn.pre_nms,
        fpn.post_nms,
        fpn.pooler_side,
    )
    assert (found.masks, found.metric, found.train_sides, found.test_side) == (False, "voc", (400,), 400)
    assert (found.anchors, found.max_side) == ((16, 32, 64, 128, 256), 666)
    assert resolved_recipe(DetectionConfig("voc07", precise_bn_iterations=0)).precise_bn_iterations == 0
    assert detection_problem(DetectionConfig("voc07", curve_points=3)).evaluate_at == (3_000, 6_000, 9_000)
    assert detection_problem(DetectionConfig("voc07")).evaluate_at == ()


def test_the_protocol_says_what_was_done() -> None:
    found = task.protocol(DetectionConfig("coco_fpn"), "test")
    assert found["name"] == "Mask R-CNN FPN of detectron2, fine-tuned"
    assert (found["split"], found["trained_on"]) == ("test", ["train", "val"])
    assert found["schedule"]["iterations"] == 90_000
    assert task.splits(DetectionConfig(), "val") == ("train", "val")
    assert task.metric_names(DetectionConfig("coco_c4"))[3:] == (
        "detection/mask_ap",
        "detection/mask_ap50",
        "detection/mask_ap75",
    )


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": "voc12"}, r"recipe='voc12'; allowed: rendered, voc07, "),
        ({"head": "c5"}, r"head='c5'; allowed: recipe, c4, fpn"),
        ({"masks": "maybe"}, r"masks='maybe'; allowed: recipe, yes, no"),
        ({"metric_style": "lvis"}, r"metric_style='lvis'; allowed: recipe, coco, voc"),
        ({"seeds": 0}, r"seeds=0; it must be at least 1"),
        ({"short_side": -3}, r"short_side=-3; it must be at least 0"),
        ({"precise_bn_iterations": -2}, r"precise_bn_iterations=-2; it must be at least -1"),
        ({"iterations": 5, "curve_points": 6}, r"curve_points=6 for 5 iterations"),
    ],
)
def test_impossible_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        task.check(DetectionConfig(**options), "val", {})


def test_a_missing_detectron2_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.delitem(sys.modules, "evaluation.detection.detectron")
    command = r"python -m pip install 'git\+https://github.com/facebookresearch/detectron2.git' --no-build-isolation"
    with pytest.raises(ValueError, match=command):
        task.check(DetectionConfig(), "val", {})
    with pytest.raises(ValueError, match=r"needs the package detectron2"):
        importlib.import_module("evaluation.detection.detectron")
