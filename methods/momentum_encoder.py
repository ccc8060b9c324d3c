"""The slowly moving copy of an encoder (MoCo, Eq. 2), and ShuffleBN for its forward pass (MoCo, section 3.3).

``KeyEncoder`` puts the parts together: what turns the second view into the keys of MoCo and its relatives.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.collectives import all_gather_concat, broadcast_permutation, rank, world_size
from methods.contracts import MethodContext, Progress

__all__ = ["KeyEncoder", "MomentumEncoder", "resolve_bn_splits", "shuffled_encode", "unit_vectors"]

# Images per BatchNorm group in MoCo: a batch of 256 on 8 GPUs.
_PAPER_GROUP_SIZE = 32


def unit_vectors(x_BD: Tensor) -> Tensor:
    """Rows of length 1, in float32 or better also under autocast."""
    return F.normalize(x_BD.to(torch.promote_types(x_BD.dtype, torch.float32)), dim=1)


class MomentumEncoder(nn.Module):
    """A copy of a module whose parameters follow by an exponential moving average; it takes no gradient.

    Only parameters are averaged. BatchNorm buffers are driven by the copy's own forward passes in training mode
    (papers: MoCo's code; its keys are normalised by their own statistics).
    """

    def __init__(self, online: nn.Module) -> None:
        """Copies `online`, weights included."""
        super().__init__()
        self.module = copy.deepcopy(online).requires_grad_(False)

    @torch.no_grad()
    def update(self, online: nn.Module, momentum: float) -> None:
        """Moves every parameter: copy <- momentum * copy + (1 - momentum) * online.

        Args:
            online: the module that was copied.
            momentum: m in [0, 1]; 1 never moves.
        """
        # The lists are built at each call (under 1 ms for ResNet-50): a stored one would go stale silently when weights
        # are replaced, for example by load_state_dict(assign=True) or a deep copy.
        copies: list[Tensor] = list(self.module.parameters())
        sources: list[Tensor] = list(online.parameters())
        if copies:  # a projector of depth 0 has no parameters
            torch._foreach_lerp_(copies, sources, 1.0 - momentum)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """What the copy makes of `x`, without gradient."""
        return self.module(x)


@torch.no_grad()
def shuffled_encode(encoder: Callable[[Tensor], Tensor], images_BCHW: Tensor, seed: Tensor, counter: int) -> Tensor:
    """ShuffleBN: encodes the images in another BatchNorm grouping than their queries, and undoes the order.

    The images of all workers are gathered and permuted; each worker encodes its slice; the keys are gathered and put
    back in place. In one process the same happens within the batch, which matters when BatchNorm is split.

    Args:
        encoder: maps (B, C, H, W) to (B, D).
        images_BCHW: this worker's images.
        seed: int64 (), a buffer of the method; see ``broadcast_permutation``.
        counter: number of this forward pass within the run.

    Returns:
        (B, D), keys of this worker's images, in their order.
    """
    size = len(images_BCHW)
    mine = slice(rank() * size, (rank() + 1) * size)
    permutation_N = broadcast_permutation(world_size() * size, seed, counter)
    inverse_N = torch.argsort(permutation_N)
    shuffled = all_gather_concat(images_BCHW)[permutation_N[mine]]
    return all_gather_concat(encoder(shuffled))[inverse_N[mine]]


class KeyEncoder(nn.Module):
    """f_k: momentum copies of backbone and projector; images in, unit keys out.

    Attributes:
        shuffle_seed: int64 (), source of all ShuffleBN permutations of the run. Drawn from the global generator like
            initial weights, so workers start with the same seed (permutations are rank 0's in any case). A buffer, so
            that a resumed run continues the same permutations.
    """

    shuffle_seed: Tensor

    def __init__(self, backbone: nn.Module, projector: nn.Module, momentum: float, shuffle_bn: bool) -> None:
        """Copies both modules.

        Args:
            backbone: images to features; its BatchNorm groups are already set (``convert_batchnorm``).
            projector: features to the space of the contrast.
            momentum: m of Eq. 2.
            shuffle_bn: whether to encode with ShuffleBN.
        """
        super().__init__()
        self.backbone = MomentumEncoder(backbone)
        self.projector = MomentumEncoder(projector)
        self.momentum = momentum
        self.shuffle_bn = shuffle_bn
        self.register_buffer("shuffle_seed", torch.randint(2**62, ()))

    def follow(self, backbone: nn.Module, projector: nn.Module, progress: Progress) -> None:
        """Moves towards the online modules; once per optimiser step, however many micro-steps it has."""
        if progress.micro_step == 0:
            self.backbone.update(backbone, self.momentum)
            self.projector.update(projector, self.momentum)

    @torch.no_grad()
    def forward(self, images_BCHW: Tensor, progress: Progress) -> Tensor:
        """Keys (B, D) of length 1, without gradient."""
        if not self.shuffle_bn:
            return self._encode(images_BCHW)
        counter = progress.step * progress.num_micro_steps + progress.micro_step
        return shuffled_encode(self._encode, images_BCHW, self.shuffle_seed, counter)

    def _encode(self, images_BCHW: Tensor) -> Tensor:
        return unit_vectors(self.projector(self.backbone(images_BCHW)))


def resolve_bn_splits(bn_splits: int | Literal["auto"], shuffle_bn: bool, context: MethodContext) -> int:
    """Number of BatchNorm groups of one worker's forward pass.

    ShuffleBN only does something when a global batch has at least two BatchNorm groups: several workers, or split
    BatchNorm on one. ``auto`` makes groups of about 32 images as in the paper (256 images on 8 GPUs), whatever the
    number of workers and micro-steps, so that these do not change the method; without ShuffleBN it is 1.

    Args:
        bn_splits: groups per worker, or ``auto``.
        shuffle_bn: whether keys are shuffled.
        context: batch size, workers and micro-steps.

    Returns:
        The number of groups; it divides the images of one forward pass.
    """
    size, rest = divmod(context.global_batch_size, context.world_size * context.num_micro_steps)
    if rest or size == 0:
        raise ValueError(
            f"a global batch of {context.global_batch_size} images cannot be shared equally by {context.world_size} "
            f"workers with {context.num_micro_steps} forward passes each. Use a multiple of "
            f"{context.world_size * context.num_micro_steps}."
        )
    if bn_splits != "auto":
        if bn_splits < 1 or size % bn_splits or (bn_splits > 1 and size // bn_splits < 2):
            allowed = [str(n) for n in range(1, size // 2 + 1) if size % n == 0] or ["1"]
            raise ValueError(
                f"bn_splits={bn_splits} does not divide the {size} images of one forward pass on one worker into "
                f"groups of at least 2. Use one of {', '.join(allowed)}, or 'auto'."
            )
        return bn_splits
    if not shuffle_bn:
        return 1
    fewest = 2 if context.world_size == 1 else 1
    limit = max(fewest, size // _PAPER_GROUP_SIZE)
    splits = max(n for n in range(1, limit + 1) if size % n == 0)
    if splits < fewest or size // splits < 2:
        raise ValueError(
            f"ShuffleBN needs at least two BatchNorm groups, but the {size} images of one forward pass cannot be split "
            f"into up to {limit} equal groups of at least 2. Use an even batch size of at least 4 per forward pass, or "
            "shuffle_bn=False."
        )
    return splits
