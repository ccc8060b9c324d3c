"""How far a picture is from another: PSNR, SSIM and LPIPS, one number per pair.

LPIPS (Zhang et al., CVPR 2018; ``richzhang/PerceptualSimilarity: lpips/lpips.py``, weights of version 0.1) with the
SqueezeNet 1.1 trunk that Zhao et al. (ICLR 2021) measure feature inversion with: colours are shifted and scaled, the
outputs of seven stages get unit length in every pixel, squared differences are weighted by one learned non-negative
number per channel, averaged over pixels and summed over stages. Its weights cannot be shipped or downloaded here, so
``load_lpips`` takes them from two files. Images are not resized first: distances of pictures of one size are compared.

SSIM (Wang et al., 2004): Gaussian window of 11 x 11 px with sigma 1.5, K1 = 0.01, K2 = 0.03, over the pixels whose
window lies inside the image, averaged over the colours.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "LINEAR_SOURCE",
    "LPIPS_MIN_SIDE",
    "SSIM_MIN_SIDE",
    "TRUNK_SOURCE",
    "Lpips",
    "find_lpips_linear",
    "load_lpips",
    "mean_squared_error",
    "psnr",
    "ssim",
]

# Colours in [-1, 1] -> what the trunk was trained on; ScalingLayer of the reference.
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
# SqueezeNet's layers 0..12 cut after these, and the channels there.
STAGE_ENDS = (2, 5, 8, 10, 11, 12, 13)
STAGE_CHANNELS = (64, 128, 256, 384, 384, 512, 512)
LPIPS_MIN_SIDE = 17  # px; below, the third pool of SqueezeNet has nothing left
LPIPS_BLOCK = 32  # images per forward pass: about 0.5 GB at 224 px

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03  # of SSIM
SSIM_MIN_SIDE = WINDOW  # px; one window
MAX_PSNR = 100.0  # dB, for equal images, whose PSNR is infinite

TRUNK_SOURCE = "torchvision's squeezenet1_1 weights (https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth)"
LINEAR_SOURCE = (
    "squeeze.pth of version 0.1 (in the package lpips: `pip install lpips`; or lpips/weights/v0.1/squeeze.pth of "
    "https://github.com/richzhang/PerceptualSimilarity)"
)


def mean_squared_error(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Mean squared difference (n,) of two stacks of images, uint8 (n, 3, S, S), colours in [0, 1]."""
    _check_pair(a, b)
    difference = (a.astype(np.float64) - b.astype(np.float64)) / 255
    return np.square(difference).reshape(len(a), -1).mean(axis=1)


def psnr(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio (n,) in dB of two stacks of images, uint8 (n, 3, S, S); at most 100 dB."""
    return np.minimum(-10 * np.log10(np.maximum(mean_squared_error(a, b), 1e-30)), MAX_PSNR)


def ssim(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Structural similarity (n,), 1 for equal images, of two stacks of images, uint8 (n, 3, S, S).

    Raises:
        ValueError: images smaller than the window of 11 px.
    """
    _check_pair(a, b)
    if min(a.shape[2:]) < SSIM_MIN_SIDE:
        raise ValueError(f"SSIM needs images of at least {WINDOW} px, the side of its window; got {a.shape[2:]}.")
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    window = torch.exp(-offsets.square() / (2 * SIGMA**2))
    window = window / window.sum()

    def local_mean(x: Tensor) -> Tensor:
        rows = F.conv2d(x, window.view(1, 1, -1, 1).expand(3, 1, -1, 1), groups=3)
        return F.conv2d(rows, window.view(1, 1, 1, -1).expand(3, 1, 1, -1), groups=3)

    values = []
    for pair in zip(a, b, strict=True):  # one by one: the maps of 1000 images of 224 px in float64 are gigabytes
        x, y = (torch.from_numpy(image.astype(np.float64) / 255)[None] for image in pair)
        mean_x, mean_y = local_mean(x), local_mean(y)
        var_x, var_y = local_mean(x * x) - mean_x**2, local_mean(y * y) - mean_y**2
        covariance = local_mean(x * y) - mean_x * mean_y
        luminance = (2 * mean_x * mean_y + K1**2) / (mean_x**2 + mean_y**2 + K1**2)
        structure = (2 * covariance + K2**2) / (var_x + var_y + K2**2)
        values.append(float((luminance * structure).mean()))
    return np.array(values)


class Lpips(nn.Module):
    """LPIPS of version 0.1 on SqueezeNet 1.1, without gradients; weights from ``load_lpips``."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import squeezenet1_1

        self.trunk = squeezenet1_1(weights=None).features
        self.weights = nn.ParameterList(torch.zeros(channels) for channels in STAGE_CHANNELS)
        self.register_buffer("shift", torch.tensor(SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(SCALE).view(3, 1, 1))

    @torch.no_grad()
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Distances (n,) of RGB images (n, 3, H, W) with colours in [-1, 1]."""
        x, y = ((images - self.shift) / self.scale for images in (a, b))
        total = x.new_zeros(len(x))
        start = 0
        for end, weight in zip(STAGE_ENDS, self.weights, strict=True):
            for layer in self.trunk[start:end]:
                x, y = layer(x), layer(y)
            difference = (_unit_length(x) - _unit_length(y)).square()
            total = total + torch.einsum("nchw,c->nhw", difference, weight).mean(dim=(1, 2))
            start = end
        return total

    def distances(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distances (n,) of two stacks of images, uint8 (n, 3, S, S), in blocks.

        Raises:
            ValueError: images too small for the trunk.
        """
        _check_pair(a, b)
        if min(a.shape[2:]) < LPIPS_MIN_SIDE:
            raise ValueError(f"LPIPS with SqueezeNet needs images of at least {LPIPS_MIN_SIDE} px; got {a.shape[2:]}.")
        values = []
        for start in range(0, len(a), LPIPS_BLOCK):
            block = (x[start : start + LPIPS_BLOCK].astype(np.float32) for x in (a, b))
            x, y = (torch.from_numpy(images / 127.5 - 1).to(self.shift.device) for images in block)
            values.append(self(x, y).cpu().numpy())
        return np.concatenate(values).astype(np.float64)


def _unit_length(x: Tensor) -> Tensor:
    """Channels of every pixel at unit length; the reference's guard, outside the root."""
    return x / (x.square().sum(dim=1, keepdim=True).sqrt() + 1e-10)


def load_lpips(trunk: str | Path, linear: str | Path) -> Lpips:
    """LPIPS with weights from two files.

    Args:
        trunk: state dict of torchvision's squeezenet1_1 (the classifier may be missing).
        linear: the reference's squeeze.pth of version 0.1.

    Raises:
        ValueError: a file is missing or is something else.
    """
    model = Lpips()
    layers = _read(trunk, "lpips_trunk", TRUNK_SOURCE)
    features = {key.removeprefix("features."): x for key, x in layers.items() if key.startswith("features.")}
    _load(model.trunk, features, f"lpips_trunk={trunk}", TRUNK_SOURCE)
    stages = _read(linear, "lpips_linear", LINEAR_SOURCE)
    found = {}
    for i in range(len(STAGE_CHANNELS)):
        weight = stages.get(f"lin{i}.model.1.weight")
        if weight is not None:
            found[str(i)] = weight.flatten()
    _load(model.weights, found, f"lpips_linear={linear}", LINEAR_SOURCE)
    return model.eval().requires_grad_(False)


def find_lpips_linear() -> str:
    """squeeze.pth of an installed package lpips, without importing it; empty where there is none."""
    found = importlib.util.find_spec("lpips")
    if found is None or found.origin is None:
        return ""
    path = Path(found.origin).parent / "weights" / "v0.1" / "squeeze.pth"
    return str(path) if path.is_file() else ""


def _read(path: str | Path, option: str, source: str) -> Mapping[str, Tensor]:
    """A state dict from a file."""
    if not Path(path).expanduser().is_file():
        raise ValueError(f"{option}={path}: no such file. Give the path of {source}.")
    state = torch.load(Path(path).expanduser(), map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise ValueError(f"{option}={path} holds a {type(state).__name__}, not a state dict. Give {source}.")
    return state


def _load(module: nn.Module, state: Mapping[str, Tensor], given: str, source: str) -> None:
    """Fill a module exactly; ValueError names the first keys that do not fit."""
    own = module.state_dict()
    wrong = [key for key, x in own.items() if key not in state or state[key].shape != x.shape]
    wrong += [key for key in state if key not in own]
    if wrong:
        raise ValueError(f"{given} does not fit: {len(wrong)} tensors differ (first: {wrong[0]}). Give {source}.")
    module.load_state_dict(dict(state))


def _check_pair(a: np.ndarray, b: np.ndarray) -> None:
    for x in (a, b):
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] != 3 or x.shape != a.shape:
            raise ValueError(
                f"images are {a.dtype} {a.shape} and {b.dtype} {b.shape}; expected two stacks of one shape, uint8 "
                "(n, 3, H, W), RGB."
            )
