"""Tiny detection data in VOC's and COCO's layout, and detectors on it, for the tests of the detection task."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch

from evaluation.detection.problem import DetectionConfig, detection_problem
from evaluation.fine_tuning import Run
from evaluation.fine_tuning.loop import draws
from image_data.prepared import PreparedData
from tests.evaluation.fine_tuning.samples import rendered_data, tiny_backbone
from tests.image_data.annotated_samples import write_coco, write_voc
from tests.image_data.prepared_layouts import make

__all__ = ["TINY", "batch_of", "run_of", "shapes", "trainee_of"]

TINY = DetectionConfig(
    iterations=4, batch_size=4, learning_rate=0.02, short_side=32, precise_bn_iterations=1, diagnosis=False
)


@functools.cache
def shapes(kind: str) -> PreparedData:
    """Coloured boxes, discs and triangles in VOC's or COCO's layout."""
    folder = Path(tempfile.mkdtemp(prefix="detection-data-"))
    if kind == "voc":
        write_voc(folder / "data", counts={"train": 32, "val": 4, "test": 10})
    else:
        write_coco(folder / "data", counts={"train2017": 10, "val2017": 5})
    return make(folder, f"{kind}:{folder / 'data'}")


def run_of(config: DetectionConfig, phase: Any = "val") -> Run:
    """The run of the first seed."""
    return Run("seed0", "detection", detection_problem(config), phase)


def trainee_of(
    config: DetectionConfig, data: PreparedData | None = None, backbone: Any = None, phase: Any = "val"
) -> Any:
    """What a worker trains, on the rendered data and around the tiny backbone unless told otherwise."""
    torch.manual_seed(0)
    problem = detection_problem(config)
    backbone = backbone or tiny_backbone()
    problem.freezing.apply(backbone)
    return problem.build(backbone, data or rendered_data(), phase, 0, torch.device("cpu"))


def batch_of(trainee: Any, size: int = 4) -> Any:
    """The first images of seed 0."""
    return trainee.load(draws(0, trainee.num_images, 0, size))
