"""Variational autoencoder on the pooled feature, after Newell & Deng (CVPR 2020, arXiv 2003.14323, section 3.1).

h = f(x), mu = W_1 h, log s^2 = W_2 h, z = mu + eps s with eps ~ N(0, 1), and a decoder of transposed convolutions g:

    L = mean (g(z) - t)^2 + w KL,   KL = -1/2 sum (1 + log s^2 - mu^2 - s^2)

As in ``princeton-vl/selfstudy: models/vae.py, tasks/vae.py``: the squared error is a mean over everything, but the KL
is summed over the images of the batch too, so w = 1e-5 weighs it by the batch size; the target t is the augmented view
itself in Lab, brought to the decoder's size by taking nearest pixels. What transfers is f.

Ours: the KL is summed over the whole global batch, whatever the number of workers and micro-steps; Lab is scaled by
fixed constants (``lab.normalized_lab``) instead of a data set's statistics; the encoder sees RGB, as in every method;
convolutions before a BatchNorm have no bias; the latent may be narrower or wider than the feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.collectives import rank, world_size
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.lab import normalized_lab
from methods.monitors import feature_monitors
from methods.optimizers import OptimizerConfig
from methods.random_numbers import random_normals

__all__ = ["OPTIMIZER", "VAE", "VIEWS", "VAEConfig", "build_decoder", "kl_divergence", "output_size"]

VIEWS = ("vae",)
# ``config/syn/r9/vae.gin``: Adam, 5 epochs from 0 to 1e-3, then linearly to 1e-5, for a batch of 512.
OPTIMIZER = OptimizerConfig(
    optimizer="adam",
    learning_rate=5e-4,
    weight_decay=1e-5,
    schedule="linear",
    warmup_epochs=5,
    adam_beta1=0.8,
    adam_beta2=0.999,
    final_learning_rate=5e-6,
)
MIN_SIZE, AUTO_SIZE, MAX_SIZE = 8, 64, 512

Target = Literal["lab", "rgb"]


@dataclass(frozen=True)
class VAEConfig:
    """Latent, decoder and weights of the VAE.

    Attributes:
        latent_dim: width of z.
        kl_weight: w, weight of the KL summed over the global batch (papers: batch 384 to 512).
        output_size: side of the decoded image, a power of two from 8 to 512; auto takes the largest one that is not
            above the image size, at most 64 (the paper's).
        target: what is decoded: lab (the paper) or rgb, normalised as the views are.
        sync_batchnorm: BatchNorm over the batches of all workers, so that their number does not change the result.
    """

    latent_dim: int = 256
    kl_weight: float = 1e-5
    output_size: int | Literal["auto"] = "auto"
    target: Target = "lab"
    sync_batchnorm: bool = False


def output_size(config: VAEConfig, image_size: int) -> int:
    """Side of the decoded image."""
    if config.output_size != "auto":
        return config.output_size
    return min(max(2 ** (image_size.bit_length() - 1), MIN_SIZE), AUTO_SIZE)


def build_decoder(latent_dim: int, size: int) -> nn.Sequential:
    """(B, latent_dim, 1, 1) -> (B, 3, size, size): 4x4 transposed convolutions, 1 -> 4 pixels, then doubling.

    Widths 256, 256, 256, 128, 64, then half each time; all with BatchNorm and ReLU. A 1x1 convolution gives colours.
    """
    layers: list[nn.Module] = []
    width = latent_dim
    for i in range(size.bit_length() - 2):
        in_width, width = width, 2 ** min(8, 10 - i)
        layers.append(nn.ConvTranspose2d(in_width, width, 4, stride=2, padding=min(i, 1), bias=False))
        layers += [nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 1))


def kl_divergence(mu_BD: Tensor, log_variance_BD: Tensor) -> Tensor:
    """KL from N(mu, variance) to N(0, 1), summed over the dimensions and the images given; ()."""
    return -0.5 * (1 + log_variance_BD - mu_BD.square() - log_variance_BD.exp()).sum()


class VAE(nn.Module):
    """The pooled feature must hold what a decoder needs to paint the image again."""

    fixed_learning_rate: tuple[str, ...] = ()
    noise_seed: Tensor

    @staticmethod
    def validate(config: VAEConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot be built or trained."""
        if config.latent_dim < 1 or not config.kl_weight >= 0:
            raise ValueError(
                f"vae got latent_dim={config.latent_dim}, kl_weight={config.kl_weight}; the width must be at least 1 "
                "and the weight at least 0 (paper: 256 and 1e-5)."
            )
        size = output_size(config, context.image_size)
        if size.bit_count() != 1 or not MIN_SIZE <= size <= MAX_SIZE:
            raise ValueError(
                f"output_size={size} is not allowed: the decoder doubles its map, so it must be a power of two from "
                f"{MIN_SIZE} to {MAX_SIZE}, or 'auto'."
            )
        if config.target not in get_args(Target):
            raise ValueError(f"target={config.target!r} must be one of: {', '.join(get_args(Target))}.")

    def __init__(self, config: VAEConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.mean = nn.Linear(backbone.num_features, config.latent_dim)
        self.log_variance = nn.Linear(backbone.num_features, config.latent_dim)
        self.output_size = output_size(config, context.image_size)
        self.decoder = build_decoder(config.latent_dim, self.output_size)
        # From the global generator like the weights; a buffer, so that resume continues its numbers.
        self.register_buffer("noise_seed", torch.randint(2**62, ()))
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """Squared error of the decoded view plus the weighted KL; one view per image."""
        (x,) = batch.views
        h_BC = self.backbone(x)
        mu_BD, log_variance_BD = _at_least_float32(self.mean(h_BC)), _at_least_float32(self.log_variance(h_BC))
        z_BD = mu_BD + self._noise(mu_BD, progress) * (0.5 * log_variance_BD).exp()
        decoded = _at_least_float32(self.decoder(z_BD[:, :, None, None]))
        target = normalized_lab(x) if self.config.target == "lab" else x
        mse = F.mse_loss(decoded, F.interpolate(target, size=self.output_size, mode="nearest").to(decoded.dtype))
        kl = kl_divergence(mu_BD, log_variance_BD)
        # DDP and the train loop take means over workers and micro-steps; the KL is a sum over all of them.
        num_parts = world_size() * progress.num_micro_steps
        loss = mse + self.config.kl_weight * num_parts * kl
        metrics = {"reconstruction_mse": mse.detach(), "kl": kl.detach() / len(x)} | feature_monitors(h_BC)
        return StepOutput(loss, metrics)

    def _noise(self, like_BD: Tensor, progress: Progress) -> Tensor:
        """Standard normal numbers that depend on the image's place in the global batch, not on who holds it."""
        first = (rank() * progress.num_micro_steps + progress.micro_step) * like_BD.numel()
        return random_normals(like_BD.numel(), self.noise_seed, progress.step, first).view_as(like_BD).to(like_BD.dtype)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
