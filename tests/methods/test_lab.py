"""Lab against the CIE formulas pixel by pixel, known colours, and the normalisation of the views."""

from __future__ import annotations

import pytest
import torch

from image_data import contracts
from methods.lab import IMAGENET_MEAN, IMAGENET_STD, normalized_lab, rgb_to_lab

# sRGB -> L, a, b as colour tables print them (D65, 2 degree observer).
COLORS = {
    "black": ((0, 0, 0), (0, 0, 0)),
    "white": ((255, 255, 255), (100, 0, 0)),
    "red": ((255, 0, 0), (53.24, 80.09, 67.20)),
    "green": ((0, 255, 0), (87.73, -86.18, 83.18)),
    "blue": ((0, 0, 255), (32.30, 79.19, -107.86)),
    "yellow": ((255, 255, 0), (97.14, -21.55, 94.48)),
    "cyan": ((0, 255, 255), (91.11, -48.09, -14.13)),
    "magenta": ((255, 0, 255), (60.32, 98.23, -60.82)),
    "gray": ((128, 128, 128), (53.59, 0, 0)),
    "navy": ((0, 0, 128), (12.97, 47.50, -64.70)),
    "darkest gray": ((1, 1, 1), (0.27, 0, 0)),  # on the straight parts of both curves
}


def _image(rgb: tuple[int, int, int]) -> torch.Tensor:
    return torch.tensor(rgb, dtype=torch.float64).view(1, 3, 1, 1) / 255


@pytest.mark.parametrize("name", COLORS)
def test_known_colours(name):
    rgb, lab = COLORS[name]
    assert rgb_to_lab(_image(rgb)).flatten().tolist() == pytest.approx(lab, abs=0.02)


def _lab(r: float, g: float, b: float) -> list[float]:
    """IEC 61966-2-1 and CIE 15 for one pixel, with the CIE's exact fractions."""

    def linear(v: float) -> float:
        return v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4

    def f(t: float) -> float:
        return t ** (1 / 3) if t > (6 / 29) ** 3 else t * (29 / 6) ** 2 / 3 + 4 / 29

    r, g, b = linear(r), linear(g), linear(b)
    x = 0.4124564 * r + 0.3575761 * g + 0.1804375 * b
    y = 0.2126729 * r + 0.7151522 * g + 0.0721750 * b
    z = 0.0193339 * r + 0.1191920 * g + 0.9503041 * b
    fx, fy, fz = f(x / 0.95047), f(y), f(z / 1.08883)
    return [116 * fy - 16, 500 * (fx - fy), 200 * (fy - fz)]


@pytest.mark.parametrize("scale", [1.0, 0.05])  # 0.05: around the knees of both curves
def test_random_pixels_are_the_slow_formula(scale):
    rgb = torch.rand(2, 3, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * scale
    lab = rgb_to_lab(rgb)
    assert lab.dtype == torch.float64
    for b in range(2):
        for y in range(5):
            for x in range(7):
                expected = _lab(*(float(v) for v in rgb[b, :, y, x]))
                # Seven digits of the matrix here, six (scikit-image's) there.
                assert lab[b, :, y, x].tolist() == pytest.approx(expected, abs=6e-3)


def test_float32_is_float64_rounded():
    rgb = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    lab = rgb_to_lab(rgb.float())
    assert lab.dtype == torch.float32
    torch.testing.assert_close(lab.double(), rgb_to_lab(rgb), rtol=1e-5, atol=1e-3)


def test_half_precision_and_autocast_are_computed_in_float32():
    rgb = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    expected = rgb_to_lab(rgb)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rgb_to_lab(rgb), expected)
    assert rgb_to_lab(rgb.bfloat16()).dtype == torch.float32
    torch.testing.assert_close(rgb_to_lab(rgb.bfloat16()), rgb_to_lab(rgb.bfloat16().float()))
    assert normalized_lab(_views(rgb).bfloat16()).dtype == torch.float32
    torch.testing.assert_close(normalized_lab(_views(rgb).bfloat16()), normalized_lab(_views(rgb)), rtol=0, atol=0.15)


def test_values_outside_are_clipped():
    rgb = torch.tensor([-0.5, 1.5, 0.25]).view(1, 3, 1, 1)
    lab = rgb_to_lab(rgb)
    assert torch.equal(lab, rgb_to_lab(rgb.clamp(0, 1)))
    assert lab.isfinite().all()


def _views(rgb: torch.Tensor) -> torch.Tensor:
    mean, std = (rgb.new_tensor(v).view(3, 1, 1) for v in (contracts.IMAGENET_MEAN, contracts.IMAGENET_STD))
    return (rgb - mean) / std


def test_constants_are_those_of_the_stream():
    assert (IMAGENET_MEAN, IMAGENET_STD) == (contracts.IMAGENET_MEAN, contracts.IMAGENET_STD)


def test_normalized_lab_undoes_the_views_normalisation():
    rgb = torch.rand(3, 3, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    lab = rgb_to_lab(rgb)
    expected = torch.stack([lab[:, 0] / 50 - 1, lab[:, 1] / 50, lab[:, 2] / 50], dim=1)
    torch.testing.assert_close(normalized_lab(_views(rgb)), expected)


def test_constants_are_copied_to_the_device_once(monkeypatch):
    # A copy in every step makes the host wait for a GPU.
    x = torch.randn(1, 3, 4, 4)
    first = normalized_lab(x)
    for owner, name in ((torch, "tensor"), (torch, "as_tensor"), (torch.Tensor, "new_tensor")):
        monkeypatch.setattr(owner, name, None)
    assert torch.equal(normalized_lab(x), first)


def test_inference_mode_first_and_training_later_may_share_constants():
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    with torch.inference_mode():
        first = normalized_lab(x)
    layer = torch.nn.Conv2d(3, 1, 1).double()
    layer(normalized_lab(x)).sum().backward()
    assert torch.equal(normalized_lab(x), first)


def test_gradients_reach_the_pixels_also_after_inference_mode():
    # Feature inversion optimises the picture through the conversion.
    x = torch.randn(1, 3, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        normalized_lab(x)
    assert torch.autograd.gradcheck(normalized_lab, (0.3 * x).requires_grad_())


def test_memory_layout_is_kept():
    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    lab = normalized_lab(x)
    assert lab.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(lab, normalized_lab(x.contiguous()))
