"""Area, spatial entropy and mass concentration against planted maps, scipy and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from evaluation.cam_statistics import STATISTICS, area_fraction, map_statistics, mass_concentration, spatial_entropy


def random_maps(n: int = 5, height: int = 12, width: int = 9) -> torch.Tensor:
    maps = torch.rand(n, height, width, generator=torch.Generator().manual_seed(0)) ** 3
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return (maps - low) / (high - low)


@pytest.mark.parametrize(
    ("ones", "area", "concentration"),
    [(1, 0.01, 1.0), (10, 0.1, 1.0), (25, 0.25, 0.4), (50, 0.5, 0.2), (100, 1.0, 0.1)],
)
def test_maps_with_a_known_number_of_equal_pixels(ones: int, area: float, concentration: float) -> None:
    flat = torch.zeros(100)
    flat[torch.randperm(100, generator=torch.Generator().manual_seed(ones))[:ones]] = 1.0
    found = {name: float(values) for name, values in map_statistics(flat.view(1, 10, 10)).items()}
    assert found["cam/area"] == pytest.approx(area)
    assert found["cam/spatial_entropy"] == pytest.approx(math.log(ones) / math.log(100), abs=1e-12)
    assert found["cam/mass_concentration"] == pytest.approx(concentration)


def test_entropy_equals_scipy_and_is_an_integral_over_a_known_density() -> None:
    maps = random_maps()
    expected = scipy.stats.entropy(maps.flatten(1).numpy().astype(np.float64), axis=1) / math.log(12 * 9)
    np.testing.assert_allclose(spatial_entropy(maps), expected, rtol=1e-12)
    # A round Gaussian of standard deviation s pixels: differential entropy ln(2 pi e s^2).
    axis, s = torch.arange(128, dtype=torch.float64) - 63.5, 6.0
    bump = torch.exp(-(axis[:, None] ** 2 + axis**2) / (2 * s**2))
    expected_bump = math.log(2 * math.pi * math.e * s**2) / math.log(128**2)
    assert float(spatial_entropy(bump[None])) == pytest.approx(expected_bump, abs=1e-9)


def test_area_and_concentration_equal_loops() -> None:
    maps = random_maps()
    for i, one in enumerate(maps.double().tolist()):
        pixels = sorted((value for row in one for value in row), reverse=True)
        assert float(area_fraction(maps)[i]) == pytest.approx(sum(v > 0.5 for v in pixels) / 108)
        assert float(mass_concentration(maps)[i]) == pytest.approx(sum(pixels[:11]) / sum(pixels))  # 10.8 rounded up


def test_a_zero_map_counts_as_evenly_spread_and_changes_no_other() -> None:
    maps = torch.cat([random_maps(2), torch.zeros(1, 12, 9)])
    found = map_statistics(maps)
    alone = map_statistics(maps[:2])
    for name in STATISTICS:
        np.testing.assert_array_equal(found[name][:2], alone[name])
    assert float(found["cam/area"][2]) == 0
    assert float(found["cam/spatial_entropy"][2]) == pytest.approx(1)
    assert float(found["cam/mass_concentration"][2]) == pytest.approx(11 / 108)
