"""The one fine-tuning loop: any trainee, any number of workers, CPU or GPU; it knows no Ray.

Which images a step sees is a function of (seed, iteration) and each image's random numbers one of (seed, its position
in the endless order), so 1 process and N train on the same batches and a resumed run sees what the uninterrupted one
would have seen.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from evaluation.fine_tuning import Draw, FineTuneResult, Predictions, Run, Trainee
from evaluation.fine_tuning.freezing import set_training_mode
from evaluation.fine_tuning.schedule import build_optimizer, learning_rate, set_learning_rate
from image_data.prepared import PreparedData
from methods.batchnorm import convert_batchnorm
from methods.collectives import all_reduce_mean

__all__ = ["STATE", "FineTuneReporter", "FineTuningDiverged", "Place", "draws", "fine_tune"]

STATE = "fine_tuning.pt"
LOSS_POINTS = 200  # of the stored loss curve
CHECKPOINTS = 10  # of a run, besides those at evaluated iterations
GPU_CHECK_EVERY = 50  # iterations between looks at the loss on a GPU, where each look waits for the device
_ORDER_WORD, _AUGMENT_WORD, _STEP_WORD = 0x4F52, 0x4155, 0x5354  # keep the kinds of draws of one seed apart


class FineTuningDiverged(RuntimeError):
    """The loss became NaN or infinite; the message names the run and the iteration."""


class FineTuneReporter(Protocol):
    """How state leaves the loop; every worker calls ``report`` equally often."""

    def report(self, metrics: dict[str, Any], save: Callable[[Path], None] | None) -> None:
        """Metrics carry "iteration" = steps done; ``save`` (worker 0) writes a checkpoint into a folder."""
        ...

    def latest(self) -> AbstractContextManager[Path | None]:
        """The newest checkpoint folder of this run."""
        ...

    def progress(self, metrics: dict[str, Any]) -> None:
        """For a display, at any time."""
        ...


@dataclass(frozen=True)
class Place:
    """This process: rank, number of workers, device, loader threads."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    threads: int = 1


@dataclass
class _Training:
    run: Run
    place: Place
    trainee: Trainee
    backbone: Any
    wrapped: nn.Module
    optimizer: torch.optim.Optimizer
    predictions: dict[int, Predictions] = field(default_factory=dict)
    losses: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def draws(seed: int, num_images: int, start: int, stop: int) -> list[Draw]:
    """Positions ``start`` to ``stop`` of the endless order: one permutation of the images after the other."""
    found, order, epoch = [], np.zeros(0, np.int64), -1
    for position in range(start, stop):
        if position // num_images != epoch:
            epoch = position // num_images
            order = np.random.default_rng([_ORDER_WORD, seed, epoch]).permutation(num_images)
        rng = np.random.default_rng([_AUGMENT_WORD, seed, position])
        found.append(Draw(int(order[position % num_images]), rng))
    return found


def fine_tune(run: Run, backbone: Any, data: PreparedData, place: Place, reporter: FineTuneReporter) -> FineTuneResult:
    """Train from the newest checkpoint (or the start) to the last iteration; score at ``evaluate_at`` and at the end.

    Args:
        run: what to train.
        backbone: with its start weights, on the CPU; the same on all workers. It is trained in place.
        data: of the task, as this node sees it.
        place: this process.
        reporter: where progress and checkpoints go.

    Returns:
        The same on every worker.

    Raises:
        FineTuningDiverged: NaN or infinite loss.
        ValueError: what the problem refuses.
    """
    schedule = run.problem.schedule
    if schedule.batch_size % place.world_size:
        raise ValueError(
            f"{run.task}: a batch of {schedule.batch_size} images does not divide over {place.world_size} workers; use "
            "a batch size that is a multiple of the number of workers."
        )
    training = _prepare(run, backbone, data, place)
    start = _resume(training, reporter)
    total = schedule.iterations
    evaluated = sorted({i for i in run.problem.evaluate_at if i < total} | {total})
    saved = set(evaluated) | {round(total * i / CHECKPOINTS) for i in range(1, CHECKPOINTS)}
    began, recent = time.perf_counter(), []
    set_training_mode(training.trainee.model, backbone, run.problem.freezing)
    with _Loader(training, start) as loader:
        for iteration in range(start, total):
            recent.append(_step(training, next(loader), iteration))
            done = iteration + 1
            if _is_looked_at(training, done, total, saved):
                _check(training, recent, done)
            if done % max(1, total // LOSS_POINTS) == 0 or done in saved:
                _log(training, recent, done, began, reporter)
            if done in evaluated:
                training.predictions[done] = _predict(training)
            if done in saved:
                training.seconds, began = training.seconds + time.perf_counter() - began, time.perf_counter()
                saver = _saver(training, done) if place.rank == 0 else None
                reporter.report({"iteration": done, "loss": training.losses[-1][1]}, saver)
    return FineTuneResult(training.predictions, np.array(training.losses).reshape(-1, 2), training.seconds)


def _prepare(run: Run, backbone: Any, data: PreparedData, place: Place) -> _Training:
    torch.manual_seed(run.seed)
    run.problem.freezing.apply(backbone)
    trainee = run.problem.build(backbone, data, run.phase, run.seed, place.device)
    trainee.model.to(place.device)
    wrapped = trainee.model
    optimizer = build_optimizer(run.problem.schedule, trainee.parameter_groups())
    if place.world_size > 1:
        convert_batchnorm(trainee.model, "sync")  # one process normalises by the whole batch, so N must too
        wrapped = DistributedDataParallel(
            trainee.model,
            device_ids=[place.device.index] if place.device.type == "cuda" else None,
            broadcast_buffers=False,
            find_unused_parameters=getattr(trainee, "has_unused_parameters", False),
        )
    return _Training(run, place, trainee, backbone, wrapped, optimizer)


def _resume(training: _Training, reporter: FineTuneReporter) -> int:
    """Load the newest checkpoint; returns the iterations done."""
    with reporter.latest() as folder:
        if folder is None:
            return 0
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    training.trainee.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    training.losses = [(int(i), float(loss)) for i, loss in state["losses"]]
    training.predictions = {
        iteration: {name: values.numpy() for name, values in found.items()}
        for iteration, found in state["predictions"].items()
    }
    training.seconds = state["seconds"]
    return int(state["iteration"])


def _saver(training: _Training, iteration: int) -> Callable[[Path], None]:
    state = {
        "model": training.trainee.model.state_dict(),
        "optimizer": training.optimizer.state_dict(),
        "losses": training.losses,
        "predictions": {
            at: {name: torch.from_numpy(np.ascontiguousarray(values)) for name, values in found.items()}
            for at, found in training.predictions.items()
        },
        "seconds": training.seconds,
        "iteration": iteration,
    }
    return lambda folder: torch.save(state, folder / STATE)


class _Loader:
    """This worker's batches, loaded ahead in threads."""

    def __init__(self, training: _Training, start: int) -> None:
        place, batch = training.place, training.run.problem.schedule.batch_size
        share = batch // place.world_size
        trainee, seed = training.trainee, training.run.seed

        def load(iteration: int) -> Any:
            first = iteration * batch + place.rank * share
            return trainee.load(draws(seed, trainee.num_images, first, first + share))

        self._load, self._next = load, start
        self._ahead = place.threads + 1
        self._pool = ThreadPoolExecutor(place.threads, thread_name_prefix="fine-tuning-loader")
        self._pending: deque[Future[Any]] = deque()

    def __enter__(self) -> _Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> _Loader:
        return self

    def __next__(self) -> Any:
        while len(self._pending) < self._ahead:
            self._pending.append(self._pool.submit(self._load, self._next))
            self._next += 1
        return self._pending.popleft().result()


def _step(training: _Training, batch: Any, iteration: int) -> Tensor:
    """One optimiser step; returns the loss of this worker."""
    schedule = training.run.problem.schedule
    # Dropout and sampling of this step depend on nothing that came before, so a resumed run needs no generator state.
    words = np.random.SeedSequence([_STEP_WORD, training.run.seed, iteration, training.place.rank])
    torch.manual_seed(int(words.generate_state(1)[0]))
    set_learning_rate(training.optimizer, learning_rate(schedule, iteration))
    training.optimizer.zero_grad(set_to_none=True)
    losses = training.wrapped(batch)
    loss = torch.stack(list(losses.values())).sum()
    loss.backward()
    if schedule.clip_norm:
        nn.utils.clip_grad_norm_(training.trainee.model.parameters(), schedule.clip_norm)
    training.optimizer.step()
    return loss.detach()


def _is_looked_at(training: _Training, done: int, total: int, saved: set[int]) -> bool:
    on_gpu = training.place.device.type == "cuda"
    return not on_gpu or done % GPU_CHECK_EVERY == 0 or done in saved or done == total


def _check(training: _Training, recent: list[Tensor], done: int) -> None:
    """All workers see the mean over workers, so that they stop in the same iteration."""
    loss = float(all_reduce_mean(recent[-1]))
    if not math.isfinite(loss):
        run = training.run
        raise FineTuningDiverged(
            f"The loss of {run.task} ({run.name}) became NaN or infinite at iteration {done} of "
            f"{run.problem.schedule.iterations}. Lower the task's learning rate, or evaluate another checkpoint."
        )


def _log(training: _Training, recent: list[Tensor], done: int, began: float, reporter: FineTuneReporter) -> None:
    """Add a point to the loss curve."""
    if not recent:
        return
    loss = float(all_reduce_mean(torch.stack(recent).mean()))
    recent.clear()
    training.losses.append((done, loss))
    seconds = training.seconds + time.perf_counter() - began
    reporter.progress({"iteration": done, "loss": loss, "seconds": seconds})


@torch.no_grad()
def _predict(training: _Training) -> Predictions:
    """Score all images, each on one worker; the same result on every worker."""
    place, trainee, run = training.place, training.trainee, training.run
    with _Loader(training, run.problem.schedule.iterations) as batches:
        trainee.before_predict(batches)
    trainee.model.eval()
    rows = np.array_split(np.arange(trainee.num_scored), place.world_size)[place.rank]
    own = trainee.predict(rows.tolist())
    set_training_mode(trainee.model, training.backbone, run.problem.freezing)
    if place.world_size == 1:
        return own
    import torch.distributed as dist

    gathered: list[Any] = [None] * place.world_size
    dist.all_gather_object(gathered, own)
    return {name: np.concatenate([part[name] for part in gathered]) for name in own}
