"""Transfer by fine-tuning: what a task states, what a worker builds of it, and who runs it.

A task (detection, segmentation, ...) describes its training as a ``Problem``: a frozen dataclass, so it can be sent to
a worker, hashed and stored. A worker builds a ``Trainee`` of it: network, how a batch is loaded, how images are scored.
``loop.fine_tune`` trains any trainee, on one process or many. Tasks ask ``EvaluationContext.fine_tuning`` for the runs
and turn the predictions that come back into metrics, in the process of the evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from evaluation.fine_tuning.freezing import Freezing
from evaluation.fine_tuning.schedule import Schedule
from evaluation.metric import Phase
from image_data.prepared import PreparedData
from image_data.tables import ImageTable, open_table

__all__ = [
    "Draw",
    "FineTuneResult",
    "FineTuning",
    "Freezing",
    "Initial",
    "Predictions",
    "Problem",
    "Run",
    "Schedule",
    "Trainee",
    "scored_table",
    "task_splits",
    "train_splits",
    "train_table",
]

Initial = Literal["checkpoint", "random"]
Predictions = dict[str, np.ndarray]  # name -> values; the rows of each array are in the order of the scored images


class Draw(NamedTuple):
    """One image of a training batch.

    Attributes:
        row: of the training images, 0 to ``Trainee.num_images`` - 1.
        rng: this image's own random numbers: the same whichever worker loads it.
    """

    row: int
    rng: np.random.Generator


class Trainee(Protocol):
    """What a worker trains and scores.

    Attributes:
        model: ``model(batch)`` takes what ``load`` returned (CPU; it moves what it needs to its device) and returns
            {name: scalar}, whose sum is the loss. **The mean over the workers must be the loss of the global batch**:
            where a loss is an average over something that differs between the workers (valid pixels, sampled boxes),
            use ``normalize.share_of_mean``.
        num_images: training images.
        num_scored: images that ``predict`` can be asked for.
    """

    model: nn.Module
    num_images: int
    num_scored: int

    def load(self, draws: Sequence[Draw]) -> Any:
        """A batch of images and targets, augmented with each draw's own ``rng``; called in loader threads."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for the optimiser: "params", and optionally "lr_scale" (default 1) and "weight_decay".

        Parameters that are frozen (``requires_grad`` False) must be left out.
        """
        ...

    def before_predict(self, batches: Iterator[Any]) -> None:
        """Called on every worker before images are scored, the model in training mode, no gradients: for precise
        BatchNorm statistics. ``batches`` are augmented training batches without end."""
        ...

    def predict(self, rows: Sequence[int]) -> Predictions:
        """Scores some images, the model in eval mode, no gradients. What all workers return is joined along the first
        axis; ``rows`` of worker 0 come first. An array must have a first axis, of any length."""
        ...


class Problem(Protocol):
    """What is trained: a frozen dataclass of plain values (and ``Schedule``), which can be sent, hashed and stored.

    Attributes:
        schedule: iterations, batch size, optimiser, learning rate.
        evaluate_at: iterations after which the scored images are predicted; the last one is always among them.
        freezing: which stages of the backbone are not trained.
    """

    @property
    def schedule(self) -> Schedule: ...

    @property
    def evaluate_at(self) -> tuple[int, ...]: ...

    @property
    def freezing(self) -> Freezing: ...

    def build(self, backbone: Any, data: PreparedData, phase: Phase, seed: int, device: torch.device) -> Trainee:
        """The network around a backbone, and its data.

        Args:
            backbone: the start weights are loaded; it becomes part of the network, or gives its weights to it.
            data: train on ``train_table(data, phase)``, score ``scored_table(data, phase)``.
            phase: see there.
            seed: torch's generator is seeded with it already (initialisation of heads).
            device: where the model goes.
        """
        ...


@dataclass(frozen=True)
class Run:
    """One training of a problem.

    Attributes:
        name: unique in the task: "seed0", "n250-scratch-seed1"; shown in progress.
        task: the task's name; its data are ``FineTuning.data(task)``.
        problem: what is trained.
        phase: which splits are trained on and scored.
        seed: of heads, order and augmentation.
        initial: the backbone's start: the checkpoint's weights, or freshly initialised ones of the same network.
    """

    name: str
    task: str
    problem: Any
    phase: Phase
    seed: int = 0
    initial: Initial = "checkpoint"


@dataclass(frozen=True)
class FineTuneResult:
    """What a run gave.

    Attributes:
        predictions: iteration -> predictions of all scored images.
        losses: (P, 2), iteration and mean loss since the point before.
        seconds: of training, over all starts.
    """

    predictions: Mapping[int, Predictions]
    losses: np.ndarray = field(default_factory=lambda: np.zeros((0, 2)))
    seconds: float = 0.0

    @property
    def last(self) -> Predictions:
        """Predictions after the last iteration, which are what is reported."""
        return self.predictions[max(self.predictions)]


@dataclass(frozen=True)
class FineTuning:
    """How an evaluation trains.

    Attributes:
        data: task name -> its prepared data (that of the checkpoint, unless other data was given for the task).
        run: trains runs and yields (position, result) as they finish. A run that was finished before with the same
            settings is not repeated, an interrupted one goes on. ``spread``: many small runs, each in one process, as
            many at once as there are workers; otherwise one after the other, each on all workers.
        backbone: fresh copy of the checkpoint's backbone (or a freshly initialised one), on the CPU, for checks.
    """

    data: Callable[[str], PreparedData]
    run: Callable[..., Iterator[tuple[int, FineTuneResult]]]
    backbone: Callable[[Initial, int], Any]

    def results(self, runs: Sequence[Run], spread: bool = False) -> list[FineTuneResult]:
        """All results, in the order of ``runs``."""
        found = dict(self.run(runs, spread=spread))
        return [found[i] for i in range(len(runs))]


def train_splits(phase: Phase) -> tuple[str, ...]:
    """What is trained on: for the report also the validation images, as in "trainval"."""
    return ("train",) if phase == "val" else ("train", "val")


def task_splits(phase: Phase) -> tuple[str, ...]:
    """All splits that a fine-tuning task reads: its training splits, then the scored one."""
    return (*train_splits(phase), phase)


def train_table(data: PreparedData, phase: Phase) -> ImageTable:
    """The images that are trained on."""
    return open_table(data, train_splits(phase))


def scored_table(data: PreparedData, phase: Phase) -> ImageTable:
    """The images that are scored: "val" or "test"."""
    return open_table(data, (phase,))
