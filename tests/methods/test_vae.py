"""The loss as a slow formula with gradients, the decoder's shapes, the noise, workers and micro-steps, precision."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from methods import vae
from methods.backbones import build_backbone
from methods.lab import normalized_lab
from methods.optimizers import build_optimizer, learning_rate
from methods.random_numbers import random_normals
from methods.vae import OPTIMIZER, VAE, VAEConfig, build_decoder, output_size
from tests.methods import small_training
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress, train_steps

SMALL = VAEConfig(latent_dim=5, kl_weight=0.01)


def _method(config: VAEConfig = SMALL, **context: int) -> VAE:
    torch.manual_seed(0)
    return VAE(config, TinyBackbone(), make_context(**context)).double()


def _slow_parts(method: VAE, x: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Squared error and KL in loops over images, dimensions, channels and pixels; with graph."""
    h = method.backbone(x)
    mu = h @ method.mean.weight.T + method.mean.bias
    log_variance = h @ method.log_variance.weight.T + method.log_variance.bias
    noise = random_normals(mu.numel(), method.noise_seed, step).double().view_as(mu)
    z, kl = torch.zeros_like(mu), torch.zeros((), dtype=torch.float64)
    for b in range(mu.shape[0]):
        for d in range(mu.shape[1]):
            sigma = torch.sqrt(torch.exp(log_variance[b, d]))
            z[b, d] = mu[b, d] + noise[b, d] * sigma
            kl = kl + kl_divergence(Normal(mu[b, d], sigma), Normal(0.0, 1.0))
    decoded = method.decoder(z[:, :, None, None])
    target = normalized_lab(x) if method.config.target == "lab" else x
    size, total = method.output_size, torch.zeros((), dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            nearest = target[:, :, i * x.shape[2] // size, j * x.shape[3] // size]
            total = total + (decoded[:, :, i, j] - nearest).square().sum()
    return total / (len(x) * 3 * size * size), kl


@pytest.mark.parametrize("target", ["lab", "rgb"])
@pytest.mark.parametrize("size", ["auto", 16])
def test_loss_and_gradients_are_the_slow_formula(target, size):
    method, batch = _method(replace(SMALL, target=target, output_size=size)), make_batch(1)
    names = [name for name, _ in method.named_parameters()]
    output = method(batch, progress(2))
    ours = torch.autograd.grad(output.loss, list(method.parameters()))
    mse, kl = _slow_parts(method, batch.views[0], 2)
    expected = torch.autograd.grad(mse + 0.01 * kl, list(method.parameters()))
    assert output.loss.item() == pytest.approx(mse.item() + 0.01 * kl.item(), rel=1e-9)
    assert output.metrics["reconstruction_mse"].item() == pytest.approx(mse.item(), rel=1e-9)
    assert output.metrics["kl"].item() == pytest.approx(kl.item() / 8, rel=1e-9)
    for name, a, b in zip(names, ours, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize(
    ("size", "widths"),
    [
        (8, [256, 256]),
        (32, [256, 256, 256, 128]),
        (64, [256, 256, 256, 128, 64]),
        (128, [256, 256, 256, 128, 64, 32]),
    ],
)
def test_decoder_has_the_authors_widths_and_sizes(size, widths):
    decoder = build_decoder(7, size)
    sides: list[int] = []
    x = torch.randn(2, 7, 1, 1)
    for layer in decoder:
        x = layer(x)
        if isinstance(layer, nn.ConvTranspose2d):
            sides.append(x.shape[-1])
    assert [m.out_channels for m in decoder if isinstance(m, nn.ConvTranspose2d)] == widths
    assert sides == [4 * 2**i for i in range(len(widths))]
    assert x.shape == (2, 3, size, size)


@pytest.mark.parametrize(("image_size", "size"), [(6, 8), (8, 8), (32, 32), (63, 32), (64, 64), (84, 64), (224, 64)])
def test_auto_size_is_the_largest_power_of_two_up_to_64(image_size, size):
    assert output_size(VAEConfig(), image_size) == size
    assert output_size(VAEConfig(output_size=16), image_size) == 16


def test_kl_is_0_at_the_prior_and_torchs_elsewhere():
    zero = torch.zeros(3, 4)
    assert vae.kl_divergence(zero, zero) == 0
    mu, log_variance = torch.randn(2, 3, 4, dtype=torch.float64)
    expected = kl_divergence(Normal(mu, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(vae.kl_divergence(mu, log_variance), expected)


def test_the_kl_pulls_the_latent_to_the_prior():
    method = _method(replace(SMALL, kl_weight=1.0)).float()
    nn.init.constant_(method.mean.bias, 3.0)
    optimizer = torch.optim.Adam(method.parameters(), lr=0.05)
    kls = []
    for step in range(30):
        output = method(make_batch(1, dtype=torch.float32), progress(step, 30))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        kls.append(float(output.metrics["kl"]))
    assert kls[0] > 10
    assert kls[-1] < 2


def test_it_learns_to_reconstruct_colours():
    # Images of one colour each: the decoder must read it from the latent.
    method = _method(VAEConfig(latent_dim=8, kl_weight=1e-5)).float()
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    errors = []
    for step in range(25):
        x = torch.randn(32, 3, 1, 1, generator=torch.Generator().manual_seed(step)).expand(-1, -1, 8, 8).contiguous()
        output = method(make_batch(1, 32)._replace(views=[x]), progress(step, 25))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        errors.append(float(output.metrics["reconstruction_mse"]))
    assert sum(errors[-5:]) < 0.5 * sum(errors[:5])


def test_noise_differs_between_steps_and_images():
    method = _method()
    zeros = torch.zeros(8, 5)
    first, second = (method._noise(zeros, progress(step)) for step in range(2))
    assert len(torch.cat([first, second]).unique()) == 80
    assert torch.equal(method._noise(zeros, progress(0)), first)


def test_latent_width_is_free_and_defaults_fit_resnet9():
    torch.manual_seed(0)
    method = VAE(VAEConfig(), build_backbone("resnet9", "small"), make_context(image_size=32))
    assert (method.mean.in_features, method.mean.out_features) == (256, 256)
    output = method(make_batch(1, 2, size=32, dtype=torch.float32), progress())
    assert output.loss.isfinite()
    assert _method(replace(SMALL, latent_dim=11)).decoder[0].in_channels == 11


# One process = two processes = micro-steps.


class _FirstView(VAE):
    """The shared loop gives two views."""

    def forward(self, batch, progress):
        return super().forward(batch._replace(views=batch.views[:1]), progress)


def _without_batchnorm(config, backbone, context) -> VAE:
    method = _FirstView(config, backbone, context)
    method.decoder = nn.Sequential(*(m for m in method.decoder if not isinstance(m, nn.BatchNorm2d)))
    return method


PLAIN = small_training.Run(_without_batchnorm, SMALL, batchnorm=False)  # type: ignore[arg-type]


def _build(context: Any) -> VAE:
    return VAE(replace(SMALL, sync_batchnorm=True), TinyBackbone(), context)


def _train_all() -> dict[str, Any]:
    (run,) = small_training.run_all([replace(PLAIN, num_micro_steps=2)], 2)
    return {"sync": train_steps(_build, 1, num_steps=3), "micro": {key: run[key] for key in ("losses", "grads")}}


@pytest.fixture(scope="module")
def in_two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    return run_processes(_train_all, 2, tmp_path_factory.mktemp("two"))


def test_two_processes_equal_one(in_two_processes):
    one = train_steps(_build, 1, num_steps=3)
    for two in in_two_processes:
        torch.testing.assert_close(two["sync"], one, rtol=1e-5, atol=1e-8)


def test_two_processes_with_micro_steps_equal_one_step(in_two_processes):
    (one,) = small_training.run_all([PLAIN], 2)
    for two in in_two_processes:
        torch.testing.assert_close(two["micro"], {key: one[key] for key in ("losses", "grads")})


# State, precision, errors


@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_are_finite_and_every_parameter_has_a_gradient(bf16):
    method = _method().float()
    optimizer = build_optimizer(method, OPTIMIZER, 512)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = method(make_batch(1, seed=step, dtype=torch.float32), progress(step))
        assert output.loss.isfinite()
        assert output.loss.dtype == torch.float32
        assert all(value.isfinite() and not value.requires_grad for value in output.metrics.values())
        assert {"reconstruction_mse", "kl", "feature_spread", "mean_cosine"} == set(output.metrics)
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
        optimizer.step()
        method.after_step(progress(step))


def test_resumed_runs_draw_the_same_noise(tmp_path):
    method = _method()
    torch.save(method.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(9)
    other = VAE(SMALL, TinyBackbone(), make_context()).double()
    assert other.noise_seed != method.noise_seed
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    batch = make_batch(1)
    assert torch.equal(other(batch, progress(2)).loss, method(batch, progress(2)).loss)


def test_the_schedule_is_the_authors():
    rates = [learning_rate(OPTIMIZER, 512, epoch * 10, 8000, 10) for epoch in (0, 1, 5, 800)]
    assert rates == pytest.approx([0, 0.0002, 0.001, 0.00001])
    assert (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2, OPTIMIZER.weight_decay) == (0.8, 0.999, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_dim": 0}, "latent_dim=0.*at least 1"),
        ({"kl_weight": -1.0}, "kl_weight=-1.0.*at least 0"),
        ({"kl_weight": math.nan}, "kl_weight=nan"),
        ({"output_size": 48}, "output_size=48.*power of two from 8 to 512, or 'auto'"),
        ({"output_size": 4}, "output_size=4"),
        ({"output_size": 1024}, "output_size=1024"),
        ({"target": "hsv"}, "target='hsv' must be one of: lab, rgb"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        VAE.validate(replace(SMALL, **changes), make_context())
