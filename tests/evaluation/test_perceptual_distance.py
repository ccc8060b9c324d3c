"""Distances against the lpips package, torchmetrics and formulas."""

from __future__ import annotations

import warnings
from pathlib import Path

import lpips
import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure
from torchvision.models import squeezenet1_1

from evaluation.perceptual_distance import (
    LPIPS_MIN_SIDE,
    find_lpips_linear,
    load_lpips,
    mean_squared_error,
    psnr,
    ssim,
)


def pictures(n: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random images, so that neighbouring pixels are alike as in pictures."""
    coarse = torch.rand(n, 3, max(2, side // 8), max(2, side // 8), generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")
    return (smooth.clamp(0, 1) * 255).to(torch.uint8).numpy()


@pytest.fixture(scope="module")
def reference() -> lpips.LPIPS:
    """The package with its learned linear weights on a random trunk: downloads are not possible in tests."""
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the package uses torchvision's old argument
        torch.manual_seed(3)
        model = lpips.LPIPS(net="squeeze", version="0.1", pnet_rand=True, verbose=False)
    return model.eval()


@pytest.fixture(scope="module")
def trunk(reference: lpips.LPIPS, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same trunk as a file of torchvision's kind."""
    network = squeezenet1_1(weights=None)
    slices = [layer for i in range(1, 8) for layer in getattr(reference.net, f"slice{i}")]
    assert len(slices) == len(network.features)
    for layer, source in zip(network.features, slices, strict=True):
        layer.load_state_dict(source.state_dict())
    path = tmp_path_factory.mktemp("lpips") / "squeezenet1_1.pth"
    torch.save(network.state_dict(), path)
    return path


@pytest.mark.parametrize("side", [LPIPS_MIN_SIDE, 36, 64])
def test_lpips_equals_the_package(reference: lpips.LPIPS, trunk: Path, side: int) -> None:
    a, b = pictures(3, side), pictures(3, side, seed=1)
    ours = load_lpips(trunk, find_lpips_linear())
    x, y = (torch.from_numpy(images.astype(np.float32) / 127.5 - 1) for images in (a, b))
    with torch.no_grad():
        expected = reference(x, y).flatten().numpy()
    assert expected.min() > 0.01
    np.testing.assert_allclose(ours.distances(a, b), expected, rtol=1e-5)
    np.testing.assert_allclose(ours.distances(a, a), 0, atol=1e-7)


def test_lpips_in_blocks(trunk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pictures(5, 24), pictures(5, 24, seed=1)
    model = load_lpips(trunk, find_lpips_linear())
    whole = model.distances(a, b)
    monkeypatch.setattr("evaluation.perceptual_distance.LPIPS_BLOCK", 2)
    np.testing.assert_allclose(model.distances(a, b), whole, rtol=1e-5)


def test_lpips_refuses_wrong_files(trunk: Path, tmp_path: Path) -> None:
    linear = find_lpips_linear()
    with pytest.raises(ValueError, match=r"lpips_trunk=.*no such file.*squeezenet1_1-b8a52dc0"):
        load_lpips(tmp_path / "missing.pth", linear)
    with pytest.raises(ValueError, match=r"lpips_linear=.*squeeze\.pth"):
        load_lpips(trunk, tmp_path / "missing.pth")
    with pytest.raises(ValueError, match=r"lpips_trunk=.*does not fit"):
        load_lpips(linear, linear)
    with pytest.raises(ValueError, match=r"lpips_linear=.*does not fit"):
        load_lpips(trunk, Path(linear).with_name("alex.pth"))
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list"):
        load_lpips(tmp_path / "list.pth", linear)
    small = pictures(1, LPIPS_MIN_SIDE - 1)
    with pytest.raises(ValueError, match=f"at least {LPIPS_MIN_SIDE} px"):
        load_lpips(trunk, linear).distances(small, small)


@pytest.mark.parametrize("side", [11, 36])
def test_ssim_equals_torchmetrics(side: int) -> None:
    a, b = pictures(4, side), pictures(4, side, seed=1)
    b[0] = a[0]
    x, y = (torch.from_numpy(images).double() / 255 for images in (a, b))
    # torchmetrics also averages over reflected borders; of its map, the windows inside the image are compared.
    _, of_pixels = structural_similarity_index_measure(
        x, y, sigma=1.5, kernel_size=11, data_range=1.0, reduction="none", return_full_image=True
    )
    expected = of_pixels[:, :, 5:-5, 5:-5].mean(dim=(1, 2, 3))
    np.testing.assert_allclose(ssim(a, b), expected.numpy(), atol=1e-6)
    assert ssim(a, b)[0] == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 11 px"):
        ssim(a[:, :, :10], b[:, :, :10])


def test_psnr_equals_torchmetrics() -> None:
    a, b = pictures(4, 16), pictures(4, 16, seed=1)
    x, y = (torch.from_numpy(images).double() / 255 for images in (a, b))
    expected = peak_signal_noise_ratio(x, y, data_range=1.0, reduction="none", dim=(1, 2, 3))
    np.testing.assert_allclose(psnr(a, b), expected.numpy(), rtol=1e-6)
    np.testing.assert_allclose(mean_squared_error(a, b), ((x - y) ** 2).mean(dim=(1, 2, 3)).numpy())
    assert psnr(a, a).tolist() == [100.0] * 4


def test_pairs_of_another_kind_are_refused() -> None:
    a = pictures(2, 16)
    for b in (a[:1], a.astype(np.float32), a[:, :1]):
        with pytest.raises(ValueError, match="two stacks of one shape"):
            psnr(a, b)
