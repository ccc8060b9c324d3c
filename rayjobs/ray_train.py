"""All code that talks to Ray Train: the trainer, the reporter inside its workers, progress to the driver."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
import ray.train
import ray.train.torch
import torch
from ray.train.torch import TorchConfig, TorchTrainer

from rayjobs.configs import PretrainConfig
from rayjobs.job import Job, run_job, uses_memory, view_recipes
from rayjobs.train_loop import TrainingDiverged, Worker

__all__ = ["ProgressBoard", "ProgressPoller", "build_trainer", "fit", "latest_epoch"]

# A rank waits in the report barrier while rank 0 probes the transfer and saves; far above any probe.
COLLECTIVE_TIMEOUT_S = 3600
START_FAILURES = 5  # Ray's default is to retry for ever, which turns an infeasible request into a hang


class ProgressBoard:
    """Actor that carries reports from the workers to the driver; created with ``ray.remote``."""

    def __init__(self) -> None:
        self._items: list[dict[str, Any]] = []

    def put(self, item: dict[str, Any]) -> None:
        """Add a report."""
        self._items.append(item)

    def drain(self) -> list[dict[str, Any]]:
        """Take all reports since the last call."""
        items, self._items = self._items, []
        return items


class ProgressPoller:
    """Thread on the driver that hands the board's reports to ``show`` twice a second."""

    def __init__(self, show: Callable[[dict[str, Any]], None]) -> None:
        self.board = ray.remote(num_cpus=0)(ProgressBoard).remote()
        self._show = show
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)

    def __enter__(self) -> ProgressPoller:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            is_last = self._stop.wait(0.5)
            try:
                items = ray.get(self.board.drain.remote())
            except ray.exceptions.RayError:
                return  # the cluster is going down; the driver's own error says why
            for item in items:
                self._show(item)
            if is_last:
                return


class TrainReporter:
    """The loop's Reporter inside a Ray Train worker."""

    def __init__(self, rank: int, board: Any = None, counter: str = "epoch") -> None:
        """Args: counter: the metric that numbers reports and names their checkpoints."""
        self._rank = rank
        self._board = board
        self._counter = counter

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        """Report on every rank; rank 0 hands over the checkpoint."""
        if self._board is not None and self._rank == 0:
            self._board.put.remote({"kind": "report", **metrics})
        with tempfile.TemporaryDirectory(prefix="checkpoint-") as directory:
            checkpoint = None
            if save is not None:
                save(Path(directory))
                checkpoint = ray.train.Checkpoint.from_directory(directory)
            name = f"{self._counter}_{int(metrics[self._counter]):05d}"
            ray.train.report(metrics, checkpoint=checkpoint, checkpoint_dir_name=name)

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The newest checkpoint of this run, also after a worker died or the driver was restarted."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as directory:
            yield Path(directory)

    def progress(self, metrics: dict[str, Any]) -> None:
        """Fire and forget: a lost progress line costs nothing."""
        if self._board is not None and self._rank == 0:
            self._board.put.remote({"kind": "progress", "pid": os.getpid(), **metrics})


def _train_worker(arguments: dict[str, Any]) -> dict[str, str]:
    job: Job = arguments["job"]
    context = ray.train.get_context()
    device = ray.train.torch.get_device() if job.config.train.use_gpu else torch.device("cpu")
    worker = Worker(context.get_world_rank(), context.get_world_size(), device)
    is_streamed = job.config.train.epochs > 0 and not uses_memory(job.config.train, job.data)
    shard = ray.train.get_dataset_shard("train") if is_streamed else None
    try:
        run_job(job, worker, TrainReporter(worker.rank, arguments["board"]), shard)
    except TrainingDiverged as error:
        return {"diverged": str(error)}  # all ranks see it in the same step; an exception would be retried
    return {}


def build_trainer(
    job: Job, storage: str, name: str, callbacks: list[Any] | None = None, board: Any = None
) -> TorchTrainer:
    """A trainer whose ``fit`` resumes by itself when ``storage/name`` already holds a run.

    Args:
        job: what to train.
        storage: absolute local path or URI that every node reaches.
        name: run name under it; the same name continues the same run.
        callbacks: Ray Train callbacks (Tune's report callback).
        board: a ProgressBoard actor for the driver's display.
    """
    config = job.config
    settings = config.train
    datasets, data_config = {}, None
    if settings.epochs and not uses_memory(settings, job.data):
        datasets, data_config = _datasets(job, storage, name)
    resources: dict[str, float] = {"CPU": settings.cpus_per_worker}
    if settings.use_gpu:
        resources["GPU"] = 1
    return TorchTrainer(
        _train_worker,
        train_loop_config={"job": job, "board": board},
        torch_config=TorchConfig(backend="nccl" if settings.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker=resources,
            label_selector=job.placement.train,
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            callbacks=callbacks or [],
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=START_FAILURES
            ),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
        datasets=datasets,
        dataset_config=data_config,
    )


def _datasets(job: Job, storage: str, name: str) -> tuple[dict[str, Any], Any]:
    """The training data as a factory that Ray Train calls at every start of the worker group."""
    from image_data.ray_stream import train_data_config

    return {"train": _DatasetFactory(job, storage, name)}, train_data_config(job.config.train.num_workers)


class _DatasetFactory:
    """Builds the dataset so that its first execution is the epoch that training resumes at."""

    def __init__(self, job: Job, storage: str, name: str) -> None:
        self._job, self._storage, self._name = job, storage, name

    def __call__(self) -> Any:
        from image_data.ray_stream import make_train_dataset

        config: PretrainConfig = self._job.config
        return make_train_dataset(
            self._job.data.split("train"),
            view_recipes(config),
            image_size=config.train.image_size,
            batch_size=config.train.batch_size // config.train.num_workers,
            world_size=config.train.num_workers,
            seed=config.train.seed,
            backend=config.train.augmentation,
            # A finished run is started once more to report its last metrics; it reads no batch.
            start_epoch=min(latest_epoch(self._storage, self._name), config.train.epochs - 1),
            num_epochs=config.train.epochs,
            label_selector=self._job.placement.data,
        )


def fit(trainer: TorchTrainer) -> ray.train.Result:
    """Run a trainer to its end.

    Raises:
        TrainingDiverged: the loss became NaN or infinite (Ray Train does not retry that: it would happen again).
        ray.train.TrainingFailedError: workers died or raised more often than ``max_failures`` allows.
    """
    result = fit_until_interrupted(trainer)
    diverged = (result.return_value or {}).get("diverged")
    if diverged:
        raise TrainingDiverged(diverged)
    return result


def fit_until_interrupted(trainer: TorchTrainer) -> ray.train.Result:
    """``trainer.fit()`` in which Ctrl-C stops the workers and then raises KeyboardInterrupt, as everywhere else.

    Ray Train's own handler ends the process instead, so that callers cannot say what is kept and how to go on, and
    stays installed after the run.
    """
    if threading.current_thread() is not threading.main_thread():
        return trainer.fit()  # where no handler can be installed: a trial of Ray Tune
    before = signal.getsignal(signal.SIGINT)
    try:
        return trainer.fit()
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def latest_epoch(storage: str, name: str) -> int:
    """Epochs finished in the newest committed checkpoint of a run, 0 if there is none.

    Ray Train's own record of committed checkpoints is ``checkpoint_manager_snapshot.json``; our checkpoint folders are
    named by the number of finished epochs.
    """
    import json

    from pyarrow.fs import FileSystem, FileType

    filesystem, path = FileSystem.from_uri(storage) if "://" in storage else (None, storage)
    if filesystem is None:
        from pyarrow.fs import LocalFileSystem

        filesystem = LocalFileSystem()
    snapshot = f"{path}/{name}/checkpoint_manager_snapshot.json"
    if filesystem.get_file_info(snapshot).type == FileType.NotFound:
        return 0
    with filesystem.open_input_stream(snapshot) as stream:
        stored = json.loads(stream.read())
    latest = stored.get("latest_checkpoint_result")
    if not latest:
        return 0
    return int(latest["checkpoint_dir_name"].removeprefix("epoch_"))
