"""Fine-tuning runs in this process, their checkpoints in a local folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from evaluation.fine_tuning import FineTuneResult, FineTuning, Initial, Run
from evaluation.fine_tuning.loop import STATE, Place, fine_tune
from image_data.prepared import PreparedData

__all__ = ["FolderReporter", "local_fine_tuning"]


class FolderReporter:
    """The loop's reporter for one process: one checkpoint in a folder, which appears whole or not at all."""

    def __init__(self, folder: Path | None, on_progress: Callable[[dict[str, Any]], None] | None = None) -> None:
        """Args: folder: None keeps no checkpoints."""
        self._folder, self._on_progress = folder, on_progress

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        """Replace the checkpoint."""
        if self._folder is None or save is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._folder, prefix=".saving-") as work:
            save(Path(work))
            os.replace(Path(work) / STATE, self._folder / STATE)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The folder, if it holds a checkpoint."""
        has_one = self._folder is not None and (self._folder / STATE).is_file()
        yield self._folder if has_one else None

    def progress(self, metrics: dict[str, Any]) -> None:
        """Hand on."""
        if self._on_progress is not None:
            self._on_progress(metrics)


def local_fine_tuning(
    backbone: Callable[[Initial, int], Any],
    data: Callable[[str], PreparedData],
    device: torch.device,
    *,
    threads: int = 1,
    folder: Path | None = None,
    on_progress: Callable[[Run, dict[str, Any]], None] | None = None,
) -> FineTuning:
    """Trains in this process, one run after the other.

    Args:
        backbone: (initial, seed) -> a fresh backbone with its start weights, on the CPU.
        data: task -> prepared data.
        device: where the models go.
        threads: that load batches.
        folder: receives ``<task>-<run name>/`` with the checkpoint of an unfinished run; None keeps none, so that an
            interrupted run starts over.
        on_progress: gets the run and its iteration, loss and seconds.
    """

    def run_all(runs: Sequence[Run], spread: bool = False) -> Iterator[tuple[int, FineTuneResult]]:
        for position, run in enumerate(runs):
            own = None if folder is None else folder / f"{run.task}-{run.name}"
            reporter = FolderReporter(own, _bound(on_progress, run))
            start = backbone(run.initial, run.seed)
            yield position, fine_tune(run, start, data(run.task), Place(device=device, threads=threads), reporter)
            if own is not None:
                shutil.rmtree(own, ignore_errors=True)

    return FineTuning(data, run_all, backbone)


def _bound(
    on_progress: Callable[[Run, dict[str, Any]], None] | None, run: Run
) -> Callable[[dict[str, Any]], None] | None:
    return None if on_progress is None else lambda metrics: on_progress(run, metrics)
