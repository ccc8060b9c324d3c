"""Tiny rendered data, a tiny backbone, and fine-tuning runs on them, for the tests of the fine-tuning tasks."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.fine_tuning import FineTuneResult, FineTuning, Run
from evaluation.fine_tuning.local import FolderReporter, local_fine_tuning
from evaluation.fine_tuning.loop import Place, fine_tune
from evaluation.metric import EvaluationContext
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from methods.backbones import ResNet9

__all__ = [
    "Interrupted",
    "fine_tuning",
    "fine_tuning_context",
    "rendered_data",
    "resumed",
    "run_in_two_processes",
    "run_once",
    "tiny_backbone",
]

URI = "rendered:?image_size=32&instances=2,1,1&held_out_instances=1&images_per_instance=1&classes=20&factors=0110"


@functools.cache
def rendered_data(uri: str = URI) -> PreparedData:
    """12 base classes of 5 coarse ones or so: 24 train, 12 val and 12 test images of 32 px with all targets."""
    cache = tempfile.mkdtemp(prefix="fine-tuning-data-")
    return prepare(DataConfig(data=(uri,), cache=cache), log=lambda _: None)


def tiny_backbone(initial: str = "checkpoint", seed: int = 0) -> ResNet9:
    """ResNet-9 with the small stem at an eighth of its width: stride 8, 32 features; other weights where "random"."""
    torch.manual_seed(1000 * (initial == "random") + seed)
    return ResNet9(stem="small", width=8)


def fine_tuning(
    data: PreparedData | None = None, folder: Path | None = None, backbone: Any = tiny_backbone
) -> FineTuning:
    """Runs in this process."""
    return local_fine_tuning(backbone, lambda _: data or rendered_data(), torch.device("cpu"), folder=folder)


def fine_tuning_context(phase: Any = "test", data: PreparedData | None = None, seed: int = 0) -> EvaluationContext:
    """What a fine-tuning task gets; it has no features."""

    def no_features(split: str) -> Any:
        raise AssertionError(f"a fine-tuning task asked for features of {split}")

    return EvaluationContext(no_features, phase, seed, fine_tuning=fine_tuning(data))


def run_once(run: Run, data: PreparedData | None = None, backbone: Any = tiny_backbone) -> FineTuneResult:
    """One run in this process without checkpoints."""
    start = backbone(run.initial, run.seed)
    return fine_tune(run, start, data or rendered_data(), Place(), FolderReporter(None))


class Interrupted(Exception):
    """What ``resumed`` stops a run with."""


def resumed(
    run: Run, folder: Path, stop_at: int, data: PreparedData | None = None, backbone: Any = tiny_backbone
) -> FineTuneResult:
    """The run, killed right after its first checkpoint at or after ``stop_at`` iterations, and started again."""

    class Stopping(FolderReporter):
        def report(self, metrics: dict[str, Any], save: Any) -> None:
            super().report(metrics, save)
            if metrics["iteration"] >= stop_at:
                raise Interrupted

    own = data or rendered_data()
    try:
        fine_tune(run, backbone(run.initial, run.seed), own, Place(), Stopping(folder))
        raise AssertionError("the run ended before it was stopped")
    except Interrupted:
        pass
    return fine_tune(run, backbone(run.initial, run.seed), own, Place(), FolderReporter(folder))


def _one_of_two(run: Run, data: PreparedData, backbone: Any) -> dict[str, Any]:
    from methods.collectives import rank

    result = fine_tune(run, backbone(run.initial, run.seed), data, Place(rank(), 2), FolderReporter(None))
    last = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in result.last.items()}
    return {"losses": torch.from_numpy(result.losses), "last": last}


def run_in_two_processes(
    run: Run, tmp_path: Path, data: PreparedData | None = None, backbone: Any = tiny_backbone
) -> FineTuneResult:
    """The run on two gloo processes; both must return the same."""
    from tests.methods.distributed import run_processes

    first, second = run_processes(_one_of_two, 2, tmp_path, run, data or rendered_data(), backbone)
    assert torch.equal(first["losses"], second["losses"])
    assert all(torch.equal(first["last"][name], second["last"][name]) for name in first["last"])
    last = {name: values.numpy() for name, values in first["last"].items()}
    return FineTuneResult({run.problem.schedule.iterations: last}, first["losses"].numpy())
