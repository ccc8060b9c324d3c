"""AMDIM (Bachman, Hjelm & Buchwalter, NeurIPS 2019, arXiv 1906.00910) on a standard ResNet, as Newell & Deng train it.

A source vector a_i of one view of image i must find the locations t_il of the other view's map among those of other
images (Eqs. 2-4 of AMDIM). With <a, t> / sqrt(d) softly clipped to [-c, c] by s = c tanh(. / c),

    L = mean_il -log [ exp s(a_i, t_il) / (exp s(a_i, t_il) + sum_{j != i, l'} exp s(a_i, t_jl')) ]

and 0.05 times the mean square of the scores before clipping. Terms "1-5", "1-7" and "5-5" (source-target): the global
vector, or one random location of the 5x5 map, against the maps of 5x5 and 7x7 locations; both view orders averaged, the
terms summed.

As in ``princeton-vl/selfstudy: models/amdim.py, tasks/amdim.py``: both views go through the network as one batch; 1x1
convolutions bring the maps of the last two scales to one width and are averaged to 7x7 and 5x5; c = 30 (AMDIM's own
command line: 20). Where the pooled feature already has that width it is the global vector itself, else a linear layer
follows. What transfers is f.

Ours: the maps are those at the end of the last two stages (authors: one block earlier); negatives are the images of all
workers, with gradients; BatchNorm is synchronised, because theirs is one GPU's. Negatives come from one forward pass:
micro-steps give fewer of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.collectives import gather_with_grad, rank
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.monitors import feature_monitors
from methods.optimizers import OptimizerConfig
from methods.random_numbers import random_integers

__all__ = ["AMDIM", "OPTIMIZER", "VIEWS", "AMDIMConfig", "LocationContrast", "location_contrast"]

VIEWS = ("amdim", "amdim")
# ``config/syn/r9/amdim.gin``: Adam, 5 epochs from 0 to 1e-3, then linearly to 1e-6, for a batch of 384.
OPTIMIZER = OptimizerConfig(
    optimizer="adam",
    learning_rate=1e-3 * 256 / 384,
    weight_decay=1e-5,
    schedule="linear",
    warmup_epochs=5,
    adam_beta1=0.8,
    adam_beta2=0.999,
    final_learning_rate=1e-6 * 256 / 384,
)

Term = Literal["1-5", "1-7", "5-5"]


@dataclass(frozen=True)
class AMDIMConfig:
    """Terms, scores and projections of AMDIM.

    Attributes:
        terms: which source predicts which map: 1 = the global vector, 5 and 7 = maps of 5x5 and 7x7 locations.
        tanh_clip: c, bound of the scores.
        regularizer_weight: weight of the mean squared score before clipping.
        projector_dim: d, common width of vectors and maps.
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    terms: tuple[Term, ...] = get_args(Term)
    tanh_clip: float = 30.0
    regularizer_weight: float = 0.05
    projector_dim: int = 256
    sync_batchnorm: bool = True


class LocationContrast(NamedTuple):
    """What ``location_contrast`` returns; `top1` carries no gradient.

    Attributes:
        loss: (), mean over sources and locations.
        square: (), mean squared score before clipping, over all pairs.
        top1: (), share of positives that beat every negative of their source.
    """

    loss: Tensor
    square: Tensor
    top1: Tensor


def location_contrast(source_BD: Tensor, targets_NLD: Tensor, first: int, clip: float) -> LocationContrast:
    """Every source against all locations of all images, in float32 or better also under autocast.

    Args:
        source_BD: one vector of each of B images.
        targets_NLD: L locations of each of N >= 2 images.
        first: place of the first source's own image among the N; the others follow it.
        clip: c.
    """
    dtype = torch.promote_types(source_BD.dtype, torch.float32)
    batch_size, num_images = len(source_BD), len(targets_NLD)
    with torch.autocast(source_BD.device.type, enabled=False):
        raw = source_BD.to(dtype) @ targets_NLD.to(dtype).flatten(0, 1).T / source_BD.shape[1] ** 0.5
        scores_BNL = (clip * torch.tanh(raw / clip)).view(batch_size, num_images, -1)
        image_B = torch.arange(batch_size, device=raw.device)
        own_B = image_B + first
        positive_BL = scores_BNL[image_B, own_B]
        is_own_BN1 = (own_B[:, None] == torch.arange(num_images, device=raw.device))[:, :, None]
        negatives = scores_BNL.masked_fill(is_own_BN1, -torch.inf).flatten(1)
        # -log[e^p / (e^p + e^n)] = softplus(n - p); above the threshold softplus(x) = x to machine precision.
        loss = F.softplus(negatives.logsumexp(1, keepdim=True) - positive_BL, threshold=40.0).mean()
        top1 = (positive_BL > negatives.amax(1, keepdim=True)).detach().to(dtype).mean()
        return LocationContrast(loss, raw.square().mean(), top1)


def _map_widths(backbone: Any, image_size: int) -> tuple[int, int]:
    """Channels of the last two stages, found with one image.

    Raises:
        ValueError: the stages, applied one after the other, are not the backbone.
    """
    weight = next(backbone.parameters())
    side = min(image_size, 64)
    x = torch.linspace(-2, 2, 3 * side * side, dtype=weight.dtype, device=weight.device).view(1, 3, side, side)
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            maps = [x]
            for stage in backbone.stages:
                maps.append(stage(maps[-1]))
            features = backbone.forward_features(x)
            is_whole = features.shape == maps[-1].shape and torch.allclose(features, maps[-1], rtol=1e-3, atol=1e-4)
    except RuntimeError:
        is_whole = False
    backbone.train(was_training)
    if not is_whole:
        raise ValueError(
            "amdim contrasts the maps of the last two stages, but the stages of this backbone, applied one after the "
            "other, do not give its feature map. Choose one of resnet9, resnet18, resnet34, resnet50."
        )
    return maps[-2].shape[1], maps[-1].shape[1]


class AMDIM(nn.Module):
    """Global vectors and locations of one view predict the locations of the other."""

    fixed_learning_rate: tuple[str, ...] = ()
    location_seed: Tensor

    @staticmethod
    def validate(config: AMDIMConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot be built or trained."""
        terms, known = config.terms, get_args(Term)
        if not terms or len(set(terms)) < len(terms) or not set(terms) <= set(known):
            raise ValueError(f"amdim got terms={terms!r}; allowed is any selection of {', '.join(known)}, each once.")
        if not config.tanh_clip > 0 or not config.regularizer_weight >= 0 or config.projector_dim < 1:
            raise ValueError(
                f"amdim got tanh_clip={config.tanh_clip}, regularizer_weight={config.regularizer_weight}, "
                f"projector_dim={config.projector_dim}; they must be above 0, at least 0 and at least 1 (papers: 20 to "
                "30, 0.05, 256)."
            )
        if context.global_batch_size // context.num_micro_steps < 2:
            raise ValueError(
                f"amdim takes its negatives from the other images of a forward pass, but there is one image (global "
                f"batch {context.global_batch_size}, {context.num_micro_steps} micro-steps). Use a larger batch."
            )
        if context.feature_map_side == 1:
            raise ValueError(
                f"amdim contrasts locations, but the last feature map of {context.image_size} px images is a single "
                "one with this backbone and stem. Use larger images or the small stem."
            )

    def __init__(self, config: AMDIMConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        dim, features = config.projector_dim, backbone.num_features
        width_7, width_5 = _map_widths(backbone, context.image_size)
        projections = {
            "1": nn.Identity() if features == dim else nn.Linear(features, dim),
            "5": nn.Conv2d(width_5, dim, 1),
            "7": nn.Conv2d(width_7, dim, 1),
        }
        used = {scale for term in config.terms for scale in term.split("-")}
        self.projections = nn.ModuleDict({scale: layer for scale, layer in projections.items() if scale in used})
        # From the global generator like the weights; a buffer, so that resume continues its numbers.
        self.register_buffer("location_seed", torch.randint(2**62, ()))
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """All terms in both view orders, and the regulariser."""
        x_1, x_2 = batch.views
        size = len(x_1)
        pooled, vectors = self._encode(torch.cat([x_1, x_2]))
        # (B, view, location, d)
        local = {scale: v.unflatten(0, (2, size)).transpose(0, 1) for scale, v in vectors.items()}
        # Sorted: every worker must meet the others in the same collective.
        targets = sorted({term[-1] for term in self.config.terms})
        everyone = {scale: gather_with_grad(local[scale]) for scale in targets}
        loss = pooled.new_zeros((), dtype=torch.promote_types(pooled.dtype, torch.float32))
        metrics: dict[str, Tensor] = {}
        for term in self.config.terms:
            source, target = term.split("-")
            orders = [
                location_contrast(
                    self._source(local[source][:, view], view, progress),
                    everyone[target][:, 1 - view],
                    rank() * size,
                    self.config.tanh_clip,
                )
                for view in (0, 1)
            ]
            contrast, square, top1 = ((a + b) / 2 for a, b in zip(*orders, strict=True))
            loss = loss + contrast + self.config.regularizer_weight * square
            name = f"{source}_to_{target}"
            metrics |= {f"loss_{name}": contrast.detach(), f"top1_{name}": top1}
        return StepOutput(loss, metrics | feature_monitors(pooled[:size]))

    def _encode(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Pooled feature (B, C), and scale -> projected vectors (B, locations, d), at least float32."""
        *early, last = self.backbone.stages
        for stage in early:
            x = stage(x)
        maps = {"7": x, "5": last(x)}
        if maps["5"].shape[2:].numel() == 1:
            raise ValueError(
                "The last feature map is a single location, so amdim has none to contrast. Use larger images or the "
                "small stem."
            )
        pooled = maps["5"].mean(dim=(2, 3))
        vectors = {}
        for scale, layer in self.projections.items():
            # A 1x1 convolution commutes with the average, which is the smaller map.
            v = layer(pooled)[:, :, None] if scale == "1" else layer(F.adaptive_avg_pool2d(maps[scale], int(scale)))
            vectors[scale] = v.flatten(2).transpose(1, 2).to(torch.promote_types(v.dtype, torch.float32))
        return pooled, vectors

    def _source(self, vectors_BLD: Tensor, view: int, progress: Progress) -> Tensor:
        """One location of each image, drawn by the image's place in the global batch; (B, d)."""
        size, num_locations, _ = vectors_BLD.shape
        first = (rank() * progress.num_micro_steps + progress.micro_step) * size
        location_B = random_integers(size, num_locations, self.location_seed, 2 * progress.step + view, first)
        return vectors_BLD[torch.arange(size, device=location_B.device), location_B]

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
