"""Fine-tuning runs on a Ray cluster: a Ray Train job per run, or one Ray task per run for grids of small runs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from evaluation.fine_tuning import FineTuneResult
from evaluation.fine_tuning.loop import FineTuningDiverged, Place
from rayjobs.configs import TrainConfig
from rayjobs.fine_tuning_runs import FineTuneJob, OnProgress, run_here
from rayjobs.ray_train import COLLECTIVE_TIMEOUT_S, START_FAILURES, ProgressPoller, TrainReporter, fit_until_interrupted

__all__ = ["train_job", "train_spread"]

MAX_RETRIES = 3  # of a task whose node or process was lost; errors of the code itself are not tried again


def train_job(job: FineTuneJob, on_progress: OnProgress | None = None) -> FineTuneResult:
    """One run on all workers, as a Ray Train job that resumes by itself when its folder already holds a checkpoint.

    Raises:
        FineTuningDiverged: NaN or infinite loss.
        ray.train.TrainingFailedError: workers died or raised more often than ``max_failures`` allows.
    """
    with ProgressPoller(lambda item: _show(item, job, on_progress)) as poller:
        result = fit_until_interrupted(_trainer(job, poller.board))
    returned = result.return_value or {}
    if "diverged" in returned:
        raise FineTuningDiverged(returned["diverged"])
    return returned["result"]


def _show(item: dict[str, Any], job: FineTuneJob, on_progress: OnProgress | None) -> None:
    if on_progress is not None and item.get("kind") == "progress":
        on_progress(job.run, item)


def _trainer(job: FineTuneJob, board: Any) -> TorchTrainer:
    settings = job.plan.settings
    resources: dict[str, float] = {"CPU": settings.cpus_per_worker}
    if settings.use_gpu:
        resources["GPU"] = 1
    storage, _, name = (job.folder or _scratch(job)).rpartition("/")
    return TorchTrainer(
        _worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers, use_gpu=settings.use_gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=START_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _scratch(job: FineTuneJob) -> str:
    """A folder for a run of which nothing is kept."""
    return f"{tempfile.mkdtemp(prefix='fine-tuning-')}/{job.run.task}-{job.key}"


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """One process of a Ray Train job; Ray hands the driver what rank 0 returns."""
    job: FineTuneJob = arguments["job"]
    settings = job.plan.settings
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if settings.use_gpu else torch.device("cpu")
    threads = max(1, int(settings.cpus_per_worker))
    place = Place(context.get_world_rank(), context.get_world_size(), device, threads)
    reporter = TrainReporter(place.rank, arguments["board"], counter="iteration")
    try:
        result = job.execute(place, reporter)
    except FineTuningDiverged as error:
        return {"diverged": str(error)}  # all ranks see it in the same step; an exception would be retried
    return {"result": result} if place.rank == 0 else {}


def train_spread(
    jobs: Mapping[int, FineTuneJob], settings: TrainConfig, on_progress: OnProgress | None = None
) -> Iterator[tuple[int, FineTuneResult]]:
    """Every run in one process of its own, as many at once as there are workers; yields as they finish.

    When the caller stops early (an interrupt), what waits or runs is cancelled.

    Raises:
        FineTuningDiverged: NaN or infinite loss in a run.
    """
    remote = ray.remote(
        num_cpus=settings.cpus_per_worker,
        num_gpus=float(settings.use_gpu),
        max_retries=MAX_RETRIES,
        retry_exceptions=False,
    )(_run_alone)
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and len(running) < settings.num_workers:
                number = waiting.pop(0)
                running[remote.remote(jobs[number])] = number
            (done,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(done)
            result = ray.get(done)
            if isinstance(result, str):
                raise FineTuningDiverged(result)
            if on_progress is not None:
                total = jobs[number].run.problem.schedule.iterations
                last = float(result.losses[-1, 1]) if len(result.losses) else float("nan")
                on_progress(jobs[number].run, {"iteration": total, "loss": last, "seconds": result.seconds})
            yield number, result
    finally:
        for task in running:
            ray.cancel(task, force=True)


def _run_alone(job: FineTuneJob) -> FineTuneResult | str:
    """The work of one task; a diverged run is its message, since Ray would wrap the exception."""
    device = torch.device("cuda") if job.plan.settings.use_gpu else torch.device("cpu")
    alone = replace(job, plan=replace(job.plan, on_cluster=False))
    try:
        return run_here(alone, device)
    except FineTuningDiverged as error:
        return str(error)
