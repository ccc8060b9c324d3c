"""The decoder against the reference's description, batches against single runs, and images that come back."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from evaluation.deep_image_prior import PriorNetwork, decoder_shape, draw_prior, invert_images, to_uint8


class TinyBackbone(nn.Module):
    """Two strided convolutions with BatchNorm: (B, 3, S, S) -> (B, 8, S / 4, S / 4)."""

    num_features = 8

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, padding=1)
        )
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_features(x).mean(dim=(2, 3))


def discs(n: int, side: int) -> np.ndarray:
    """A bright disc on a dark ground, each elsewhere and in its own colour; uint8 (n, 3, side, side)."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side]
    images = np.full((n, 3, side, side), 40, dtype=np.uint8)
    for image in images:
        cy, cx = rng.uniform(0.3, 0.7, size=2) * side
        inside = (y - cy) ** 2 + (x - cx) ** 2 < (0.25 * side) ** 2
        image[:, inside] = rng.integers(120, 255, size=3)[:, None]
    return images


def layers_of_the_paper() -> list[tuple[int, int, int]]:
    """(in, out, kernel) of every convolution at 256 px, from the description in words; a norm follows all but one."""
    widths, kernels = [16, 32, 64, 128, 128, 128], [7, 7, 5, 5, 3, 3]
    layers = []
    for i, (width, kernel) in enumerate(zip(widths, kernels, strict=True)):
        above = 32 if i == 0 else widths[i - 1]
        below = widths[i + 1] if i < 5 else width
        layers += [(above, 4, 1), (above, width, kernel), (width, width, kernel)]
        layers += [(4 + below, width, kernel), (width, width, 1)]
    return [*layers, (16, 3, 1)]


def test_network_is_the_papers_layer_by_layer() -> None:
    network = PriorNetwork(1, 6)
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
    found = sorted((m.in_channels, m.out_channels, m.kernel_size[0]) for m in convolutions)
    expected = layers_of_the_paper()
    assert found == sorted(expected)
    assert all(m.stride == (1, 1) and m.padding_mode == "zeros" and m.bias is not None for m in convolutions)
    norms = [m.num_features for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    joined = [in_channels for in_channels, _, kernel in expected if in_channels in (36, 68, 132) and kernel > 1]
    assert sorted(norms) == sorted([out for _, out, _ in expected[:-1]] + joined)
    # What the reference's own network counts: ``skip(32, 3, ...)`` of code_reconstruction_DIP.
    assert sum(p.numel() for p in network.parameters()) == 2_606_763


def test_network_shapes_of_small_and_large_images() -> None:
    shapes = {224: (6, 256), 256: (6, 256), 128: (6, 128), 84: (5, 96), 64: (5, 64), 36: (4, 48), 32: (4, 32)}
    assert {size: decoder_shape(size) for size in shapes} == shapes
    for size in (4, 5, 7, 17, 36, 65):
        num_scales, side = decoder_shape(size)
        assert side >= size
        assert side // 2**num_scales >= 2
        network, noise = draw_prior(size, [3, 8], seed=0)
        assert network(noise).shape == (2, 3, side, side)
    with pytest.raises(ValueError, match="too small"):
        decoder_shape(3)


def test_network_down_and_up_in_the_order_of_the_paper() -> None:
    """One scale, written out with plain functions: pool before the norm, skip beside the upsampled branch."""
    network, noise = draw_prior(4, [0], seed=3)
    s = network.scales

    def block(part: nn.Module, x: Tensor, pool: bool = False) -> Tensor:
        conv, norm = part.get_submodule("conv"), part.get_submodule("norm")
        assert isinstance(conv, nn.Conv2d)
        x = nn.functional.conv2d(x, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2)
        x = nn.AvgPool2d(2)(x) if pool else x
        return nn.LeakyReLU(0.2)(norm(x))

    below = block(s.down2, block(s.down1, noise, pool=True)).repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    joined = s.norm(torch.cat([block(s.skip, noise), below], dim=1))
    expected = network.to_rgb(block(s.up2, block(s.up1, joined)))
    torch.testing.assert_close(network(noise), expected)


def test_draws_depend_on_seed_and_row_alone() -> None:
    together, noise = draw_prior(8, [5, 9], seed=2)
    alone, noise_alone = draw_prior(8, [9], seed=2)
    torch.testing.assert_close(noise[:, 32:], noise_alone, rtol=0, atol=0)
    torch.testing.assert_close(together.to_rgb.weight[3:], alone.to_rgb.weight, rtol=0, atol=0)
    assert 0 <= float(noise.min()) <= float(noise.max()) <= 0.1
    assert float(alone.to_rgb.weight.detach().abs().max()) <= 16**-0.5
    for other in (draw_prior(8, [9], seed=3), draw_prior(8, [8], seed=2)):
        assert not torch.equal(other[1], noise_alone)
        assert not torch.equal(other[0].to_rgb.weight, alone.to_rgb.weight)


def test_image_is_the_top_left_corner() -> None:
    images = discs(2, 9)
    network, noise = draw_prior(9, [1, 2], seed=5)
    expected = to_uint8(network(noise).detach()[:, :, :9, :9])
    assert network(noise).shape[-1] == 12
    found = invert_images(TinyBackbone(), images, [1, 2], iterations=0, seed=5)
    np.testing.assert_array_equal(np.stack([result.reconstruction for result in found]), expected)


def test_batch_equals_single_runs() -> None:
    """In float64 rounding stays small over a few steps; groups that shared anything would differ at once."""
    images, backbone, rows = discs(3, 16), TinyBackbone().double(), [4, 0, 9]
    together = invert_images(backbone, images, rows, iterations=4, seed=4)
    for i, row in enumerate(rows):
        (alone,) = invert_images(backbone, images[[i]], [row], iterations=4, seed=4)
        np.testing.assert_allclose(alone.losses, together[i].losses, rtol=1e-6)
        np.testing.assert_array_equal(alone.reconstruction, together[i].reconstruction)
        assert alone.feature_variance == pytest.approx(together[i].feature_variance)


def test_inversion_gets_closer_with_iterations() -> None:
    """Planted truth: the image itself is a solution, and the loss and the distance to it both fall."""
    images = discs(1, 32)
    start, end = (invert_images(TinyBackbone(), images, [0], iterations=n, learning_rate=0.01)[0] for n in (0, 40))

    def error(reconstruction: np.ndarray) -> float:
        return float(np.square(reconstruction.astype(float) - images[0]).mean())

    assert end.feature_mse < 0.05 * start.feature_mse
    assert end.feature_mse < 0.1 * end.feature_variance
    assert error(end.reconstruction) < 0.4 * error(start.reconstruction)
    assert end.losses[0] == pytest.approx(start.feature_mse, rel=1e-5)
    assert end.losses[-1] == pytest.approx(end.feature_mse)


def test_same_seed_same_image_other_seed_other_image() -> None:
    runs = [invert_images(TinyBackbone(), discs(1, 16), [7], iterations=6, seed=s)[0] for s in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0].reconstruction, runs[1].reconstruction)
    np.testing.assert_array_equal(runs[0].losses, runs[1].losses)
    assert not np.array_equal(runs[0].reconstruction, runs[2].reconstruction)


def test_backbone_is_left_as_it_was() -> None:
    backbone = TinyBackbone()
    backbone.train()
    backbone.body[0].requires_grad_(False)
    before = {name: x.clone() for name, x in backbone.state_dict().items()}
    calls: list[bool] = []
    backbone.body[1].register_forward_hook(lambda module, *_: calls.append(module.training))
    with torch.no_grad():  # a caller without gradients must not stop the decoder's
        (result,) = invert_images(backbone, discs(1, 16), [0], iterations=3)
    assert result.losses[-1] < result.losses[0]
    assert calls
    assert not any(calls), "BatchNorm of the backbone ran in training mode"
    for name, x in backbone.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)
    assert backbone.training
    assert backbone.body[1].training
    assert [p.requires_grad for p in backbone.parameters()] == [False, False, True, True, True, True]
    assert all(p.grad is None for p in backbone.parameters())


def test_trace_and_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluation.deep_image_prior.TRACE_POINTS", 4)
    seen: list[tuple[int, float]] = []
    (result,) = invert_images(
        TinyBackbone(), discs(1, 8), [0], iterations=10, on_step=lambda step, loss: seen.append((step, loss))
    )
    assert result.steps.tolist() == [0, 3, 6, 9, 10]
    assert [step for step, _ in seen] == result.steps.tolist()
    np.testing.assert_allclose([loss for _, loss in seen], result.losses, rtol=1e-6)


def test_colours_return() -> None:
    images = discs(2, 8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalized = (torch.from_numpy(images) / 255 - mean) / std
    np.testing.assert_array_equal(to_uint8(normalized), images)
    assert to_uint8(normalized + 100).min() == 255
    assert to_uint8(normalized - 100).max() == 0


class Detached(TinyBackbone):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x.detach())


class Pooled(TinyBackbone):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x).mean(dim=(2, 3))


def test_what_cannot_be_inverted_is_refused() -> None:
    images = discs(1, 16)
    with pytest.raises(ValueError, match="no gradient reaches the input"):
        invert_images(Detached(), images, [0], iterations=2)
    with pytest.raises(ValueError, match="needs a map"):
        invert_images(Pooled(), images, [0], iterations=2)
    with pytest.raises(ValueError, match="learning_rate"):
        invert_images(TinyBackbone(), images, [0], iterations=3, learning_rate=float("inf"))
    with pytest.raises(ValueError, match="expected square"):
        invert_images(TinyBackbone(), images[:, :, :8], [0], iterations=2)
    broken = TinyBackbone()
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        invert_images(broken, images, [0], iterations=2)
