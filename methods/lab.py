"""CIE L*a*b* colours from sRGB (IEC 61966-2-1, white point D65), for CMC and the VAE of Newell & Deng."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "normalized_lab", "rgb_to_lab"]

# What the stream normalises views with; here to undo it (methods do not import from the data side).
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Linear sRGB -> XYZ divided by the white point D65 of the 2 degree observer (0.95047, 1, 1.08883).
_TO_XYZ = (
    (0.412453 / 0.95047, 0.357580 / 0.95047, 0.180423 / 0.95047),
    (0.212671, 0.715160, 0.072169),
    (0.019334 / 1.08883, 0.119193 / 1.08883, 0.950227 / 1.08883),
)
# L = 116 fy - 16, a = 500 (fx - fy), b = 200 (fy - fz)
_TO_LAB = ((0.0, 116.0, 0.0), (500.0, -500.0, 0.0), (0.0, 200.0, -200.0))
_LAB_SHIFT = (-16.0, 0.0, 0.0)


@lru_cache(maxsize=32)
def _constant(values: tuple, device: torch.device, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A tensor of constants that stays on the device: a copy from the host would wait for it in every step."""
    with torch.inference_mode(False):  # one made in inference mode could not serve a gradient later
        return torch.tensor(values, dtype=dtype, device=device).view(shape)


def _like(x: Tensor, values: tuple, shape: tuple[int, ...] = (3, 1, 1)) -> Tensor:
    return _constant(values, x.device, x.dtype, shape)


def _mix(x_B3HW: Tensor, matrix: tuple[tuple[float, ...], ...]) -> Tensor:
    """A 3x3 matrix on the channels; keeps channels_last."""
    return F.conv2d(x_B3HW, _like(x_B3HW, matrix, (3, 3, 1, 1)))


def rgb_to_lab(rgb_B3HW: Tensor) -> Tensor:
    """L in [0, 100], a and b in about [-110, 110]; float32 or better.

    Args:
        rgb_B3HW: sRGB in [0, 1]; values outside (an augmented image never has them) are clipped.
    """
    with torch.autocast(rgb_B3HW.device.type, enabled=False):
        rgb = rgb_B3HW.to(torch.promote_types(rgb_B3HW.dtype, torch.float32)).clamp(0.0, 1.0)
        linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055).pow(2.4), rgb / 12.92)
        xyz = _mix(linear, _TO_XYZ)
        f = torch.where(xyz > 0.008856, xyz.clamp_min(1e-8).pow(1 / 3), 7.787 * xyz + 16.0 / 116.0)
        return _mix(f, _TO_LAB) + _like(f, _LAB_SHIFT)


def normalized_lab(x_B3HW: Tensor) -> Tensor:
    """Views as the stream delivers them (ImageNet-normalised RGB) -> Lab with L / 50 - 1, a / 50, b / 50.

    Fixed constants instead of a data set's statistics, so that a checkpoint means the same on every data set; on
    natural images they give values of the order of 1.
    """
    x_B3HW = x_B3HW.to(torch.promote_types(x_B3HW.dtype, torch.float32))
    lab = rgb_to_lab(x_B3HW * _like(x_B3HW, IMAGENET_STD) + _like(x_B3HW, IMAGENET_MEAN)) / 50.0
    return lab - _like(lab, (1.0, 0.0, 0.0))
