"""Images from feature maps: a network that has never seen an image is fitted until its output has the given features.

Deep image prior (Ulyanov et al., CVPR 2018) with the network and the settings that Zhao et al. (ICLR 2021, section 2.3
and appendix F; ``nanxuanzhao/Good_transfer: code_reconstruction_DIP``) invert layer4 of a ResNet-50 with: only the
decoder r is optimised, so that r(z_0) has the target's features under the frozen backbone; the input z_0 is noise that
stays as it is drawn, uniform in [0, 0.1].

r has up to six scales. Each scale goes down by k x k convolution, 2x2 average pool, BatchNorm, LeakyReLU(0.2), k x k
convolution, BatchNorm, LeakyReLU; then the deeper scales; then up by nearest neighbour, beside a skip branch of 4
channels, BatchNorm, and back through a k x k and a 1x1 convolution with BatchNorm and LeakyReLU each. A last 1x1
convolution gives the image in ImageNet-normalised colours, without a sigmoid. BatchNorm works on the statistics of the
one image, which is how the network is meant to be used and not an accident of its batch size.

Several images are fitted at once as one network of grouped convolutions, a group per image: groups share nothing, so
each image sees the arithmetic of a run of its own, except for rounding. Rounding alone makes float32 runs drift apart
within ten steps (in float64 they stay together), so that the same number of images at once is part of the protocol.
Noise and weights are drawn from (seed, row) alone.

What we do differently: the reference makes 3001 steps and reads the loss before the last of them; here the steps are
counted, and the loss of the final image is computed. Below 128 px there are fewer scales (``decoder_shape``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.features import frozen
from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD

__all__ = ["Inversion", "PriorNetwork", "decoder_shape", "draw_prior", "invert_images", "to_uint8"]

WIDTHS = (16, 32, 64, 128, 128, 128)  # channels of each scale, down and up; reconstruction.py of the reference
KERNELS = (7, 7, 5, 5, 3, 3)
SKIP_CHANNELS = 4  # in the reference's code; the paper's text leaves the skip branches out
NOISE_CHANNELS = 32
NOISE_RANGE = 0.1
SLOPE = 0.2  # of LeakyReLU
TRACE_POINTS = 300  # losses that are kept of each image; 3000 of them would be 12 MB for 1000 images

OnStep = Callable[[int, float], None]  # iteration, mean feature loss of the images


class Inversion(NamedTuple):
    """One inverted image.

    Attributes:
        reconstruction: uint8 (3, S, S), RGB; the network's output brought back to [0, 1] and clamped.
        feature_mse: mean squared error of the features of the unclamped output.
        feature_variance: variance of the target map over channels and positions: the error of the best constant map.
        steps: int64 (P,), iterations at which the loss was kept: 0, ..., the last one.
        losses: float32 (P,), feature loss after that many iterations; the last entry is ``feature_mse``.
    """

    reconstruction: np.ndarray
    feature_mse: float
    feature_variance: float
    steps: np.ndarray
    losses: np.ndarray


def decoder_shape(image_size: int) -> tuple[int, int]:
    """Scales of the decoder and the side of its output, of which the image is the top left corner.

    As many of the six scales as leave 2 px of the image's side (BatchNorm needs more than one value per channel, and
    one pixel is not a map); the side is the next multiple of 2^scales: 224 px -> 6 scales of 256 px as in the paper,
    84 -> 5 of 96, 64 -> 5 of 64, 36 -> 4 of 48.

    Raises:
        ValueError: an image under 4 px.
    """
    if image_size < 4:
        raise ValueError(f"an image of {image_size} px is too small to invert; at least 4 px are needed.")
    num_scales = min(len(WIDTHS), int(math.log2(image_size)) - 1)
    unit = 2**num_scales
    return num_scales, unit * math.ceil(image_size / unit)


class _ConvNorm(nn.Module):
    """Convolution, average pool where asked for, BatchNorm, LeakyReLU; one group per image."""

    def __init__(self, num_images: int, in_channels: int, channels: int, kernel: int, pool: bool = False) -> None:
        super().__init__()
        # The bias has no effect before BatchNorm; it is kept because the reference has (and counts) it.
        self.conv = nn.Conv2d(
            num_images * in_channels, num_images * channels, kernel, padding=kernel // 2, groups=num_images
        )
        self.norm = nn.BatchNorm2d(num_images * channels)
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.leaky_relu(self.norm(F.avg_pool2d(x, 2) if self.pool else x), SLOPE)


class _Scale(nn.Module):
    """One scale of the decoder with all deeper ones inside."""

    def __init__(self, num_images: int, in_channels: int, scales: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        (width, kernel), deeper = scales[0], scales[1:]
        self.num_images = num_images
        self.skip = _ConvNorm(num_images, in_channels, SKIP_CHANNELS, 1)
        self.down1 = _ConvNorm(num_images, in_channels, width, kernel, pool=True)
        self.down2 = _ConvNorm(num_images, width, width, kernel)
        self.deeper = _Scale(num_images, width, deeper) if deeper else nn.Identity()
        joined = SKIP_CHANNELS + (deeper[0][0] if deeper else width)
        self.norm = nn.BatchNorm2d(num_images * joined)
        self.up1 = _ConvNorm(num_images, joined, width, kernel)
        self.up2 = _ConvNorm(num_images, width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        below = F.interpolate(self.deeper(self.down2(self.down1(x))), scale_factor=2, mode="nearest")
        parts = [part.unflatten(1, (self.num_images, -1)) for part in (self.skip(x), below)]
        return self.up2(self.up1(self.norm(torch.cat(parts, dim=2).flatten(1, 2))))


class PriorNetwork(nn.Module):
    """The decoder r of ``num_images`` images side by side: (1, n * 32, side, side) -> (n, 3, side, side).

    A batch of one makes BatchNorm take its statistics over the pixels of each channel, and so of each image. Weights
    come from torch's global generator; ``draw_prior`` draws them from those of the images.
    """

    def __init__(self, num_images: int, num_scales: int) -> None:
        super().__init__()
        self.num_images = num_images
        scales = list(zip(WIDTHS, KERNELS, strict=True))[:num_scales]
        self.scales = _Scale(num_images, NOISE_CHANNELS, scales)
        self.to_rgb = nn.Conv2d(num_images * WIDTHS[0], num_images * 3, 1, groups=num_images)

    def forward(self, noise: Tensor) -> Tensor:
        return self.to_rgb(self.scales(noise)).view(self.num_images, 3, *noise.shape[-2:])


@torch.no_grad()
def draw_prior(image_size: int, rows: Sequence[int], seed: int) -> tuple[PriorNetwork, Tensor]:
    """Network and noise z_0 (1, n * 32, side, side) of some images, each a function of (seed, row) alone.

    Weights and biases of the convolutions are uniform in +-1 / sqrt(fan in), PyTorch's default as in the reference.
    """
    num_scales, side = decoder_shape(image_size)
    network = PriorNetwork(len(rows), num_scales)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    noise = torch.empty(1, len(rows) * NOISE_CHANNELS, side, side)
    for i, row in enumerate(rows):
        state = np.random.SeedSequence([seed, row]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)  # torch takes 63 bits
        _part(noise, 1, i, len(rows)).uniform_(0.0, NOISE_RANGE, generator=generator)
        for conv in convolutions:
            assert conv.bias is not None
            bound = 1 / math.sqrt(conv.weight[0].numel())
            _part(conv.weight, 0, i, len(rows)).uniform_(-bound, bound, generator=generator)
            _part(conv.bias, 0, i, len(rows)).uniform_(-bound, bound, generator=generator)
    return network, noise


def _part(x: Tensor, dim: int, i: int, num_images: int) -> Tensor:
    """The part of a tensor that belongs to image i."""
    size = x.shape[dim] // num_images
    return x.narrow(dim, i * size, size)


def invert_images(
    backbone: nn.Module,
    images: np.ndarray,
    rows: Sequence[int],
    *,
    iterations: int = 3000,
    learning_rate: float = 0.001,
    seed: int = 0,
    on_step: OnStep | None = None,
) -> list[Inversion]:
    """Invert the last feature map of some images, all of them at once.

    Args:
        backbone: has ``forward_features``: normalised images (B, 3, S, S) -> (B, C, h, w). It is used in eval mode on
            the device and with the precision that it has; weights, statistics, modes and gradients are afterwards as
            before.
        images: uint8 (n, 3, S, S), RGB.
        rows: n numbers that name the images; with the seed they decide the noise and the first weights.
        iterations: Adam steps.
        learning_rate: of Adam.
        seed: of the noise and the first weights.
        on_step: called at about 300 iterations, the last one among them, with the mean loss of the images.

    Returns:
        One entry per image, in order.

    Raises:
        ValueError: the backbone gives no map, NaN, or no gradient with respect to its input; the loss diverged.
    """
    assert len(images) == len(rows) > 0, "one row number per image"
    with _constant(backbone):
        like = next(backbone.parameters())
        target = _feature_map(backbone, _normalized(images, like))
        network, noise = draw_prior(images.shape[-1], rows, seed)
        fit = _Fit(backbone, network.to(like), noise.to(like), target, images.shape[-1])
        steps, losses = fit.run(iterations, learning_rate, on_step)
        reconstructions = to_uint8(fit.last_output)
    variances = target.flatten(1).double().var(dim=1, correction=0).tolist()
    return [
        Inversion(reconstructions[i], float(losses[-1, i]), variances[i], steps, losses[:, i].copy())
        for i in range(len(images))
    ]


class _Fit:
    """The optimisation of one network against one target."""

    def __init__(self, backbone: Any, network: PriorNetwork, noise: Tensor, target: Tensor, image_size: int) -> None:
        self.backbone, self.network, self.noise = backbone, network.train(), noise
        self.target, self.image_size = target, image_size
        self.last_output = target  # overwritten by the first forward pass

    def losses(self) -> Tensor:
        """Mean squared error of the features, one per image (n,)."""
        # The top left corner, as in the reference, although the centre would be further from the zero padding.
        output = self.network(self.noise)[..., : self.image_size, : self.image_size]
        self.last_output = output.detach()
        return (self.backbone.forward_features(output) - self.target).square().mean(dim=(1, 2, 3))

    def run(self, iterations: int, learning_rate: float, on_step: OnStep | None) -> tuple[np.ndarray, np.ndarray]:
        """Make the steps; iterations (P,) at which losses (P, n) were kept."""
        optimizer = torch.optim.Adam(self.network.parameters(), lr=learning_rate, fused=True)
        every = max(1, math.ceil(iterations / TRACE_POINTS))
        kept: dict[int, np.ndarray] = {}
        for step in range(iterations):
            losses = self.losses()
            if not losses.requires_grad:
                raise ValueError(
                    f"no gradient reaches the input of the backbone ({type(self.backbone).__name__}): it changes its "
                    "input without gradients (a colour conversion under torch.no_grad, for instance), so that its "
                    "features cannot be inverted. Leave this backbone out of the task inversion."
                )
            if step % every == 0:
                self._keep(kept, step, losses, on_step)
            optimizer.zero_grad(set_to_none=True)
            losses.sum().backward()  # a sum: each image keeps the gradient, and with it the steps, of a run of its own
            optimizer.step()
        with torch.no_grad():
            self._keep(kept, iterations, self.losses(), on_step)
        return np.array(list(kept), dtype=np.int64), np.stack(list(kept.values()))

    def _keep(self, kept: dict[int, np.ndarray], step: int, losses: Tensor, on_step: OnStep | None) -> None:
        """Read the losses from the device: 300 waits in 3000 steps, and a diverged run ends at once."""
        kept[step] = losses.detach().float().cpu().numpy()
        if not np.isfinite(kept[step]).all():
            raise ValueError(
                f"the feature loss of an inversion was NaN or infinite after {step} iterations; lower learning_rate "
                "(the paper uses 0.001)."
            )
        if on_step is not None:
            on_step(step, float(kept[step].mean()))


@contextmanager
def _constant(backbone: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients of the parameters inside the block; afterwards everything as before."""
    required = [(p, p.requires_grad) for p in backbone.parameters()]
    with frozen(backbone), torch.enable_grad():
        backbone.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, flag in required:
                parameter.requires_grad_(flag)


@torch.no_grad()
def _feature_map(backbone: Any, x: Tensor) -> Tensor:
    """Target features (n, C, h, w)."""
    features = backbone.forward_features(x)
    if features.ndim != 4 or len(features) != len(x):
        raise ValueError(
            f"the backbone's forward_features returned shape {tuple(features.shape)} for {len(x)} images; inversion "
            "needs a map (B, C, h, w)."
        )
    if not torch.isfinite(features).all():
        raise ValueError(
            "the feature map to be inverted contains NaN or infinity: pretraining diverged or the checkpoint is "
            "damaged. Look at the pretraining loss, or evaluate an earlier checkpoint."
        )
    return features


def _colours(like: Tensor) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, (3, 1, 1) each, in units of [0, 1]."""
    mean, std = (like.new_tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def _normalized(images: np.ndarray, like: Tensor) -> Tensor:
    """RGB uint8 (n, 3, S, S) -> ImageNet-normalised, of the type and on the device of ``like``."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
        raise ValueError(f"images are {images.dtype} {images.shape}; expected square ones, uint8 (n, 3, S, S), RGB.")
    mean, std = _colours(like)
    writable = images if images.flags.writeable else images.copy()  # arrays from Ray's object store are read-only
    return (torch.from_numpy(writable).to(like) / 255 - mean) / std


def to_uint8(normalized: Tensor) -> np.ndarray:
    """ImageNet-normalised images (n, 3, S, S) as RGB uint8, clamped to what a picture can hold."""
    mean, std = _colours(normalized)
    return (normalized * std + mean).clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
