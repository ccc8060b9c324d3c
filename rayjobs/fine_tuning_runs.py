"""Where fine-tuning runs of a checkpoint are trained, and what is kept of them.

In this process, as a Ray Train job on any number of workers, or, for grids of small runs, as one Ray task per run. The
loop is the same (``evaluation.fine_tuning.loop``). A finished run is stored under a key of everything that its result
depends on and is not repeated; an unfinished one goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from evaluation.fine_tuning import FineTuneResult, FineTuning, Initial, Run
from evaluation.fine_tuning.local import FolderReporter
from evaluation.fine_tuning.loop import Place, fine_tune
from methods import METHODS
from methods.backbones import build_backbone
from rayjobs.checkpoint import BACKBONE, load_backbone, local_directory
from rayjobs.configs import PretrainConfig, TrainConfig, resolve_stem
from rayjobs.job import local_data, worker_device
from rayjobs.record import git_revision
from rayjobs.task_data import TaskData

__all__ = ["FineTuneJob", "OnProgress", "RunsPlan", "fine_tuning_of", "run_here", "start_backbone", "weights_hash"]

OnProgress = Callable[[Run, Mapping[str, Any]], None]


@dataclass(frozen=True)
class RunsPlan:
    """How the fine-tuning runs of one checkpoint are trained.

    Attributes:
        checkpoint: folder or URI with the backbone, which every node reaches.
        pretrain: the checkpoint's configuration: which network it is.
        weights: hash of the backbone's file.
        settings: workers, cores per worker, GPUs.
        data: the run's own images.
        task_data: images of single tasks.
        storage: folder (or URI) of checkpoints and results of runs; "" keeps nothing.
        on_cluster: as Ray jobs; otherwise in this process.
    """

    checkpoint: str
    pretrain: PretrainConfig
    weights: str
    settings: TrainConfig
    data: TaskData
    task_data: Mapping[str, TaskData]
    storage: str = ""
    on_cluster: bool = False

    def data_of(self, task: str) -> TaskData:
        """A task's images."""
        return self.task_data.get(task, self.data)


@dataclass(frozen=True)
class FineTuneJob:
    """One run as a worker process gets it; picklable."""

    run: Run
    plan: RunsPlan
    key: str

    @property
    def folder(self) -> str:
        """Where its checkpoints and result are; "" where nothing is kept."""
        name = f"{self.run.task}-{self.run.name}-{self.key}"
        return f"{self.plan.storage}/{name}" if self.plan.storage else ""

    def execute(self, place: Place, reporter: Any) -> FineTuneResult:
        """Train this worker's share."""
        torch.set_num_threads(place.threads)
        data = self.plan.data_of(self.run.task)
        prepared = local_data(data.prepared, data.config)
        backbone = start_backbone(self.plan, self.run.initial, self.run.seed)
        return fine_tune(self.run, backbone, prepared, place, reporter)


def weights_hash(directory: str | Path) -> str:
    """Hash of a local checkpoint's backbone."""
    return hashlib.sha256((Path(directory) / BACKBONE).read_bytes()).hexdigest()


def start_backbone(plan: RunsPlan, initial: Initial, seed: int) -> Any:
    """The checkpoint's backbone, or the same network with torchvision's initialisation; on the CPU."""
    if initial == "checkpoint":
        with local_directory(plan.checkpoint) as directory:
            return load_backbone(directory)[0]
    train = plan.pretrain.train
    torch.manual_seed(seed)
    color_space = METHODS[plan.pretrain.method].color_space
    return build_backbone(train.backbone, resolve_stem(train), color_space=color_space)


def fine_tuning_of(plan: RunsPlan, on_progress: OnProgress | None = None) -> FineTuning:
    """What an evaluation gets to train with."""

    def run_all(runs: Sequence[Run], spread: bool = False) -> Iterator[tuple[int, FineTuneResult]]:
        names = [(run.task, run.name) for run in runs]
        assert len(set(names)) == len(names), names
        jobs = {i: FineTuneJob(run, plan, _key(run, plan)) for i, run in enumerate(runs)}
        for i, job in list(jobs.items()):
            stored = _read_result(job.folder)
            if stored is not None:
                del jobs[i]
                yield i, stored
        for i, result in _train(jobs, plan, spread, on_progress):
            _write_result(jobs[i].folder, result)
            yield i, result

    def backbone(initial: Initial, seed: int) -> Any:
        return start_backbone(plan, initial, seed)

    return FineTuning(lambda task: plan.data_of(task).prepared, run_all, backbone)


def _train(
    jobs: Mapping[int, FineTuneJob], plan: RunsPlan, spread: bool, on_progress: OnProgress | None
) -> Iterator[tuple[int, FineTuneResult]]:
    if plan.on_cluster:
        from rayjobs.ray_fine_tuning import train_job, train_spread

        if spread:
            yield from train_spread(jobs, plan.settings, on_progress)
        else:
            for i, job in jobs.items():
                yield i, train_job(job, on_progress)
        return
    for i, job in jobs.items():
        yield i, run_here(job, worker_device(plan.settings), on_progress)


def run_here(job: FineTuneJob, device: torch.device, on_progress: OnProgress | None = None) -> FineTuneResult:
    """One run in this process; checkpoints only on storage that is a local path."""
    folder = Path(job.folder) if job.folder and "://" not in job.folder else None
    show = None if on_progress is None else lambda metrics: on_progress(job.run, metrics)
    threads = max(1, int(job.plan.settings.cpus_per_worker))
    return job.execute(Place(device=device, threads=threads), FolderReporter(folder, show))


def _key(run: Run, plan: RunsPlan) -> str:
    """Equal for runs that give the same result; with how many workers they are trained is left out."""
    train = plan.pretrain.train
    network = (train.backbone, resolve_stem(train), METHODS[plan.pretrain.method].color_space)
    record = {
        "run": asdict(run) | {"problem": [type(run.problem).__name__, asdict(run.problem)]},
        "start": plan.weights if run.initial == "checkpoint" else network,
        "data": plan.data_of(run.task).prepared.content,
        "code": git_revision(),
    }
    return hashlib.sha256(json.dumps(record, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _result_file(folder: str) -> Path | None:
    return Path(folder) / "result.npz" if folder and "://" not in folder else None


def _read_result(folder: str) -> FineTuneResult | None:
    path = _result_file(folder)
    if path is None or not path.is_file():
        return None
    with np.load(path) as stored:
        predictions: dict[int, dict[str, np.ndarray]] = {}
        for name in stored.files:
            if name not in ("losses", "seconds"):
                iteration, _, array = name.partition("/")
                predictions.setdefault(int(iteration), {})[array] = stored[name]
        return FineTuneResult(predictions, stored["losses"], float(stored["seconds"]))


def _write_result(folder: str, result: FineTuneResult) -> None:
    """Keep the result; the run's checkpoints are no longer needed."""
    path = _result_file(folder)
    if path is None:
        return
    arrays = {f"{at}/{name}": values for at, found in result.predictions.items() for name, values in found.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        np.savez(file, losses=result.losses, seconds=result.seconds, allow_pickle=False, **arrays)
    os.replace(temporary, path)
    for other in path.parent.iterdir():
        if other != path:
            shutil.rmtree(other) if other.is_dir() else other.unlink()
