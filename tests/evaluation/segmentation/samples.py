"""What the tests of segmentation share: narrow recipes, a tiny run, a Cityscapes tree, a trainee."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.fine_tuning import Run, Schedule
from evaluation.segmentation.problem import RECIPES, SegmentationProblem
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from tests.evaluation.fine_tuning.samples import rendered_data, tiny_backbone
from tests.image_data.annotated_samples import write_cityscapes

__all__ = ["NARROW", "RUN", "TINY", "V3", "streets", "trainee_of"]

NARROW = replace(RECIPES["rendered"], width=16, dropout=0.0)
TINY = SegmentationProblem(NARROW, Schedule(3, 4, 0.02, decay="poly"))
RUN = Run("seed0", "segmentation", TINY, "val")
V3 = replace(RECIPES["deeplab_v3"], width=8, auxiliary_width=8, dropout=0.0)


@functools.cache
def streets() -> tuple[PreparedData, dict[str, np.ndarray]]:
    """A tree of Cityscapes, prepared, and the label ids that were written."""
    folder = Path(tempfile.mkdtemp(prefix="segmentation-data-"))
    truth = write_cityscapes(folder / "data")
    config = DataConfig(data=(f"cityscapes:{folder / 'data'}",), cache=str(folder / "cache"))
    return prepare(config, log=lambda _: None), truth


def trainee_of(problem: SegmentationProblem = TINY, data: PreparedData | None = None, seed: int = 0) -> Any:
    """What a worker builds around the tiny backbone."""
    return problem.build(tiny_backbone(), data or rendered_data(), "val", seed, torch.device("cpu"))
