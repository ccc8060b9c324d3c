"""What every pretraining method takes and returns; the whole interface between a method and the train loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from methods.backbones import ColorSpace
from methods.optimizers import OptimizerConfig

__all__ = ["Batch", "Method", "MethodContext", "MethodSpec", "Progress", "StepOutput"]


class Batch(NamedTuple):
    """One worker's share of a global batch.

    Attributes:
        views: one float tensor (B, 3, H, W) per view, normalised; sizes may differ between views.
        labels: int64 (B,), class ids 0..num_classes-1.
        index: int64 (B,), stable id of each image in its data set, 0..num_images-1.
    """

    views: list[Tensor]
    labels: Tensor
    index: Tensor


@dataclass(frozen=True)
class Progress:
    """Where training stands; every schedule is a function of it.

    Attributes:
        step: batches trained on so far (0 in the first step).
        total_steps: optimiser steps of the whole run.
        epoch: current epoch, counted from 0.
        total_epochs: epochs of the whole run.
        micro_step: which part of the worker's batch this forward sees when gradients are accumulated, from 0.
        num_micro_steps: parts per optimiser step.
        phase: which of the method's ``num_phases(progress)`` optimiser steps on this batch, from 0.
    """

    step: int
    total_steps: int
    epoch: int
    total_epochs: int
    micro_step: int = 0
    num_micro_steps: int = 1
    phase: int = 0


class StepOutput(NamedTuple):
    """Loss (0-d, with graph) and monitors (0-d tensors, detached: reading them must not be needed in the step)."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class MethodContext:
    """What a method may know about the data and the run before it is built.

    Attributes:
        num_classes: classes of the pretraining labels.
        num_images: images of the pretraining set.
        global_batch_size: images per optimiser step over all workers and micro-steps.
        world_size: number of workers.
        image_size: side of the square views in pixels.
        num_micro_steps: forward passes per optimiser step on each worker.
        feature_map_side: height and width of the backbone's last feature map; 0 where it is not known.
    """

    num_classes: int
    num_images: int
    global_batch_size: int
    world_size: int
    image_size: int
    num_micro_steps: int = 1
    feature_map_side: int = 0


@runtime_checkable
class Method(Protocol):
    """A method is an ``nn.Module`` with this shape; ``backbone`` is the part that transfers.

    ``forward`` is the whole training-time computation, so that DDP sees it. ``after_step`` holds what follows the
    optimiser step (queue writes, momentum updates where the paper does them there). Everything that changes training
    is in ``state_dict()``. ``fixed_learning_rate`` names parameter prefixes that the schedule leaves alone.

    Optional attributes: ``has_unused_parameters = True`` where some steps leave parameters without a gradient (DDP must
    look for them); a function ``num_phases(progress) -> int`` where a method takes several optimiser steps on a batch
    (CAMtrast's released code, two after its warm-up). ``forward`` then runs once per phase (and micro-step) with
    ``progress.phase`` set, each phase ends with an optimiser step at the same learning rate, and ``after_step`` runs
    once after the last. The reported loss is the sum over the phases, whose monitors have different names. What one
    phase keeps for the next is kept per micro-step and is no state. A static function ``num_views(config) -> range``
    where the views per image are not those of ``MethodSpec.views`` in number.
    """

    backbone: nn.Module
    fixed_learning_rate: tuple[str, ...]

    def forward(self, batch: Batch, progress: Progress) -> StepOutput: ...

    def after_step(self, progress: Progress) -> None: ...


@dataclass(frozen=True)
class MethodSpec:
    """One row of ``METHODS``.

    Attributes:
        config: frozen dataclass with the paper's defaults for this preset.
        method: class, built as ``method(config, backbone, context)``; its static ``validate(config, context)`` raises
            ``ValueError`` with what is wrong, what is allowed and how to fix it, before any long work starts.
        views: names of the view recipes of ``image_data.RECIPES``, one per view of an image.
        optimizer: the paper's optimiser and schedule.
        summary: one line for help texts and tables.
        zero_init_residual: whether the paper zero-initialises the last BatchNorm gain of each residual block.
        color_space: "lab" builds the backbone as two half-width networks on L and ab (CMC), see
            ``backbones.LabBackbone``; its views must say so with the recipe step ``to_lab``.
        uses_labels: whether the labels of the images enter the loss.
    """

    config: Any
    method: type
    views: tuple[str, ...]
    optimizer: OptimizerConfig
    summary: str
    zero_init_residual: bool = False
    color_space: ColorSpace = "rgb"
    uses_labels: bool = False
