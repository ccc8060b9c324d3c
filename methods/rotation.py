"""RotNet (Gidaris, Singh & Komodakis, ICLR 2018, arXiv 1803.07728): which way up is the image?

L = -(1/4) sum_r log softmax(W f(rot_r(x)))[r], r = 0, 90, 180, 270 degrees (Eqs. 2-3). As in
``gidariss/FeatureLearningRotNet: dataloader.py`` all four copies of an image stand in one batch, so they share batch
statistics, and a rotation only moves pixels (flips and transposes): an interpolated one would give itself away. What
transfers is f; W is dropped.

``rotations="random"`` is the variant of Newell & Deng (CVPR 2020, ``princeton-vl/selfstudy: tasks/rotate.py``): one
rotation per image, the batch split evenly over the four. Ours: it is the global batch of the optimiser step that is
split, whatever the number of workers and micro-steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.collectives import broadcast_permutation, rank, world_size
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.optimizers import OptimizerConfig
from methods.supervised import accuracy, cross_entropy

__all__ = ["OPTIMIZER", "VIEWS", "Rotation", "RotationConfig", "even_turns", "rotate"]

VIEWS = ("rotation",)
# CIFAR-10 of the official code: 0.1 for 128 images, times 0.2 after 60, 120 and 160 of 200 epochs.
OPTIMIZER = OptimizerConfig(
    optimizer="sgd",
    learning_rate=0.2,
    nesterov=True,
    weight_decay=5e-4,
    schedule="step",
    schedule_every="epoch",
    milestones=(0.3, 0.6, 0.8),
    decay=0.2,
)
NUM_TURNS = 4

Rotations = Literal["all", "random"]


@dataclass(frozen=True)
class RotationConfig:
    """Which copies the network sees.

    Attributes:
        rotations: all = the four rotated copies of every image in one forward pass (RotNet); random = one rotation per
            image, the global batch split evenly over the four (Newell & Deng), a quarter of the work.
        sync_batchnorm: BatchNorm over the batches of all workers, so that their number does not change the result.
    """

    rotations: Rotations = "all"
    sync_batchnorm: bool = False


def rotate(x_BCHW: Tensor, turns_B: Tensor) -> Tensor:
    """Turns every image counter-clockwise by its number of quarter turns, exactly and without reading them on the host.

    Args:
        x_BCHW: square images.
        turns_B: int64, 0 to 3.

    Returns:
        (B, C, H, W) in the memory layout of `x_BCHW`.
    """
    turns_B111 = turns_B.view(-1, 1, 1, 1)
    half = torch.where(turns_B111 >= 2, x_BCHW.flip((2, 3)), x_BCHW)
    quarter = torch.where(turns_B111 % 2 == 1, half.transpose(2, 3).flip(2), half)
    is_last = x_BCHW.is_contiguous(memory_format=torch.channels_last)
    return quarter.contiguous(memory_format=torch.channels_last if is_last else torch.contiguous_format)


def even_turns(count: int, seed: Tensor, progress: Progress) -> Tensor:
    """This forward pass's share of a random, even split of the global batch over the four rotations; int64 (count,).

    Counts of two rotations differ by at most one. A pure function of `seed`, the step and the place in the batch.
    """
    parts = world_size() * progress.num_micro_steps
    order = broadcast_permutation(parts * count, seed, progress.step)
    first = (rank() * progress.num_micro_steps + progress.micro_step) * count
    return order[first : first + count] % NUM_TURNS


class Rotation(nn.Module):
    """Classification of the rotation through a linear layer on the pooled feature."""

    fixed_learning_rate: tuple[str, ...] = ()
    turns_seed: Tensor

    @staticmethod
    def validate(config: RotationConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        if config.rotations not in get_args(Rotations):
            raise ValueError(f"rotations={config.rotations!r} must be one of: {', '.join(get_args(Rotations))}.")

    def __init__(self, config: RotationConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, NUM_TURNS)
        # From the global generator like the weights; a buffer, so that DDP shares rank 0's and resume continues it.
        self.register_buffer("turns_seed", torch.randint(2**62, ()))
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Mean cross entropy of the rotations of the worker's images; one view per image."""
        (x,) = batch.views
        size = x.shape[0]
        if x.shape[2] != x.shape[3]:
            raise ValueError(
                f"rotation got views of {x.shape[2]}x{x.shape[3]} pixels; a quarter turn needs square views. Use a "
                "view recipe that cuts squares."
            )
        if self.config.rotations == "all":
            turns = torch.arange(NUM_TURNS, device=x.device).repeat_interleave(size)
            x = rotate(torch.cat([x] * NUM_TURNS), turns)
        else:
            turns = even_turns(size, self.turns_seed, progress)
            x = rotate(x, turns)
        logits = self.classifier(self.backbone(x))
        return StepOutput(cross_entropy(logits, turns), {"accuracy": accuracy(logits, turns)})

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
