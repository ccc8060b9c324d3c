"""Tiny rendered data, a tiny backbone, and fine-tuning runs on them, for the tests of the fine-tuning tasks."""

from __future__ import annotations

import functools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from evaluation.fine_tuning import FineTuneResult, FineTuning, Run, loop
from evaluation.fine_tuning.local import FolderReporter, local_fine_tuning
from evaluation.fine_tuning.loop import Place, fine_tune
from evaluation.fine_tuning.schedule import build_optimizer
from evaluation.metric import EvaluationContext
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from methods.backbones import ResNet9

__all__ = [
    "Interrupted",
    "Watched",
    "check_gradients",
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


@dataclass(frozen=True)
class Watched(FineTuneResult):
    """A result with the gradient of the first step, of all parameters that are trained, one after the other."""

    gradient: np.ndarray = field(default_factory=lambda: np.zeros(0))


def _watched(run: Run, data: PreparedData, place: Place, backbone: Any) -> Watched:
    found: list[np.ndarray] = []

    def keep(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not found:
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            found.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).numpy().copy())

    def build(*arguments: Any) -> torch.optim.Optimizer:
        optimizer = build_optimizer(*arguments)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    with mock.patch.object(loop, "build_optimizer", build):
        result = loop.fine_tune(run, backbone(run.initial, run.seed), data, place, FolderReporter(None))
    return Watched(**vars(result), gradient=found[0])


def run_once(run: Run, data: PreparedData | None = None, backbone: Any = tiny_backbone) -> Watched:
    """One run in this process without checkpoints."""
    return _watched(run, data or rendered_data(), Place(), backbone)


def check_gradients(one: Watched, two: Watched, tolerance: float = 1e-4) -> None:
    """The first step's gradients agree: the largest difference, as a share of the largest gradient."""
    assert one.gradient.shape == two.gradient.shape
    assert np.abs(one.gradient).max() > 0
    assert np.abs(two.gradient - one.gradient).max() <= tolerance * np.abs(one.gradient).max()


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

    result = _watched(run, data, Place(rank(), 2), backbone)
    last = {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in result.last.items()}
    return {"losses": torch.from_numpy(result.losses), "gradient": torch.from_numpy(result.gradient), "last": last}


def run_in_two_processes(
    run: Run, tmp_path: Path, data: PreparedData | None = None, backbone: Any = tiny_backbone
) -> Watched:
    """The run on two gloo processes; both must return the same."""
    from tests.methods.distributed import run_processes

    first, second = run_processes(_one_of_two, 2, tmp_path, run, data or rendered_data(), backbone)
    assert torch.equal(first["losses"], second["losses"])
    assert torch.equal(first["gradient"], second["gradient"])
    assert all(torch.equal(first["last"][name], second["last"][name]) for name in first["last"])
    last = {name: values.numpy() for name, values in first["last"].items()}
    predictions = {run.problem.schedule.iterations: last}
    return Watched(predictions, first["losses"].numpy(), gradient=first["gradient"].numpy())
