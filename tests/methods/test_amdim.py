"""Loss and gradients against loops over sources, locations and negatives; terms, workers, backbones, errors."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from methods.amdim import AMDIM, OPTIMIZER, AMDIMConfig, location_contrast
from methods.backbones import build_backbone
from methods.optimizers import build_optimizer, learning_rate
from methods.random_numbers import random_integers
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress, train_steps

SMALL = AMDIMConfig(projector_dim=5)


def _method(config: AMDIMConfig = SMALL, batch_size: int = 8) -> AMDIM:
    torch.manual_seed(0)
    return AMDIM(config, TinyBackbone(), make_context(batch_size)).double()


def _slow_average(x: Tensor, side: int) -> Tensor:
    """Averages over the windows of adaptive pooling: floor(i h / side) to ceil((i + 1) h / side)."""

    def window(i: int, size: int) -> slice:
        return slice(i * size // side, -(-(i + 1) * size // side))

    rows = []
    for i in range(side):
        cells = [x[:, :, window(i, x.shape[2]), window(j, x.shape[3])].mean((2, 3)) for j in range(side)]
        rows.append(torch.stack(cells, dim=2))
    return torch.stack(rows, dim=2)


def _slow_term(a_BD: Tensor, t_BLD: Tensor, clip: float) -> tuple[Tensor, Tensor, float]:
    """One term in one order: loss, mean squared score and top-1, one score at a time."""
    size, num_locations, d = t_BLD.shape
    loss, square, hits = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for i in range(size):
        scores: dict[tuple[int, int], Tensor] = {}
        for j in range(size):
            for l_ in range(num_locations):
                raw = (a_BD[i] * t_BLD[j, l_]).sum() / math.sqrt(d)
                square = square + raw**2
                scores[j, l_] = clip * torch.tanh(raw / clip)
        negatives = [score for (j, _), score in scores.items() if j != i]
        total = sum(score.exp() for score in negatives)
        for l_ in range(num_locations):
            positive = scores[i, l_]
            loss = loss - torch.log(positive.exp() / (positive.exp() + total))
            hits += all(positive > negative for negative in negatives)
    return loss / (size * num_locations), square / (size**2 * num_locations), hits / (size * num_locations)


def _slow_method(method: AMDIM, views: list[Tensor], step: int) -> tuple[Tensor, dict[str, float]]:
    size, dim = len(views[0]), method.config.projector_dim
    stem, layer1 = method.backbone.stages
    early = stem(torch.cat(views))
    late = layer1(early)
    linear = {}
    for scale, x in (("5", late), ("7", early)):
        if scale in method.projections:
            layer = method.projections[scale]
            projected = torch.einsum("dc,bchw->bdhw", layer.weight[:, :, 0, 0], x) + layer.bias.view(-1, 1, 1)
            linear[scale] = _slow_average(projected, int(scale)).flatten(2).transpose(1, 2)
    if "1" in method.projections:
        layer = method.projections["1"]
        linear["1"] = (late.mean((2, 3)) @ layer.weight.T + layer.bias)[:, None]
    loss, metrics = torch.zeros((), dtype=torch.float64), {}
    for term in method.config.terms:
        source, target = term.split("-")
        term_loss, term_top1 = 0.0, 0.0
        for view in (0, 1):
            a = linear[source][view * size : (view + 1) * size]
            t = linear[target][(1 - view) * size : (2 - view) * size]
            location = random_integers(size, 25, method.location_seed, 2 * step + view)
            a = torch.stack([a[i, location[i] if source == "5" else 0] for i in range(size)])
            assert a.shape == (size, dim)
            contrast, square, top1 = _slow_term(a, t, method.config.tanh_clip)
            loss = loss + (contrast + method.config.regularizer_weight * square) / 2
            term_loss += contrast.item() / 2
            term_top1 += top1 / 2
        name = term.replace("-", "_to_")
        metrics |= {f"loss_{name}": term_loss, f"top1_{name}": term_top1}
    return loss, metrics


@pytest.mark.parametrize("term", ["1-5", "1-7", "5-5"])
def test_each_term_is_the_slow_formula(term):
    _check_slow_formula(replace(SMALL, terms=(term,), tanh_clip=3.0, regularizer_weight=0.7), images=3)


def test_all_terms_together_are_the_slow_formula():
    _check_slow_formula(SMALL, images=2)


def _check_slow_formula(config: AMDIMConfig, images: int) -> None:
    method, batch = _method(config, images), make_batch(2, images)
    with torch.no_grad():
        for layer in method.projections.values():  # larger scores, so that the clip bends them
            layer.weight.mul_(3)
    parameters = dict(method.named_parameters())
    output = method(batch, progress(2))
    ours = torch.autograd.grad(output.loss, list(parameters.values()))
    loss, metrics = _slow_method(method, batch.views, 2)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-9)
    assert {name: output.metrics[name].item() for name in metrics} == pytest.approx(metrics, rel=1e-9)
    for name, a, b in zip(parameters, ours, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_scores_are_clipped_but_the_regulariser_sees_all_of_them():
    source, targets = torch.full((2, 4), 100.0), torch.full((2, 3, 4), 100.0)
    result = location_contrast(source, targets, 0, clip=30.0)
    # All scores are 30: one positive among itself and three negatives.
    assert result.loss.item() == pytest.approx(math.log(4), rel=1e-6)
    assert result.square.item() == pytest.approx((4 * 100 * 100 / 2) ** 2, rel=1e-6)
    assert result.top1 == 0


def test_perfect_and_reversed_matches():
    source = torch.eye(4, dtype=torch.float64) * 20
    targets = (torch.eye(4, dtype=torch.float64) * 20)[:, None].expand(4, 2, 4)
    good = location_contrast(source, targets, 0, 30.0)
    assert good.top1 == 1
    assert good.loss < 1e-9
    assert location_contrast(source, targets.roll(1, 0), 0, 30.0).top1 == 0


def test_first_says_where_the_sources_own_images_are():
    source, targets = torch.randn(6, 4), torch.randn(6, 3, 4)
    whole = location_contrast(source, targets, 0, 30.0)
    halves = [location_contrast(source[i : i + 3], targets, i, 30.0) for i in (0, 3)]
    for name in ("loss", "square", "top1"):
        mean = sum(getattr(half, name) for half in halves) / 2
        torch.testing.assert_close(mean, getattr(whole, name))


def test_extreme_scores_have_finite_gradients():
    source = torch.randn(3, 4, requires_grad=True)
    result = location_contrast(source * 1e4, torch.randn(3, 5, 4) * 1e4, 0, 30.0)
    (result.loss + result.square * 1e-12).backward()
    assert result.loss.isfinite()
    assert source.grad is not None
    assert source.grad.isfinite().all()


def test_scores_are_float32_under_autocast():
    source, targets = torch.randn(3, 4).bfloat16(), torch.randn(3, 5, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = location_contrast(source, targets, 0, 30.0)
    assert result.loss.dtype == torch.float32
    torch.testing.assert_close(result, location_contrast(source.float(), targets.float(), 0, 30.0))


@pytest.mark.parametrize("terms", [("1-5",), ("1-7",), ("5-5",), ("5-5", "1-7"), ("1-5", "1-7", "5-5")])
def test_any_selection_of_terms_leaves_no_parameter_without_gradient(terms):
    method = _method(replace(SMALL, terms=terms))
    assert set(method.projections) == {scale for term in terms for scale in term.split("-")}
    method(make_batch(2), progress()).loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_both_views_share_one_batch():
    # As the authors feed them: BatchNorm sees both.
    method, sizes = _method(), []
    method.backbone.stem.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    method(make_batch(2), progress())
    assert sizes == [16]


def test_the_locations_change_with_step_and_image():
    method = _method()
    grid = torch.arange(25.0).view(1, 25, 1).expand(64, 25, 1)
    draws = torch.stack([method._source(grid, view, progress(step)).flatten() for step in range(30) for view in (0, 1)])
    assert len(draws.unique(dim=0)) == 60
    counts = torch.bincount(draws.flatten().long(), minlength=25)
    assert counts.min() > 0.6 * draws.numel() / 25


@pytest.mark.parametrize("name", ["resnet9", "resnet18"])
@pytest.mark.parametrize("color_space", ["rgb", "lab"])
def test_backbones_keep_their_state_and_the_random_numbers(name, color_space):
    torch.manual_seed(0)
    backbone = build_backbone(name, "small", color_space=color_space)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    method = AMDIM(AMDIMConfig(), backbone, make_context(2, image_size=32))
    assert backbone.training
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())
    # The global vector is the pooled feature itself where the widths agree (ResNet-9 has the authors' 256).
    assert isinstance(method.projections["1"], nn.Identity if name == "resnet9" else nn.Linear)
    method(make_batch(2, 2, size=32, dtype=torch.float32), progress()).loss.backward()
    assert all(p.grad is not None for p in method.parameters())


def test_it_learns_to_find_its_own_image():
    torch.manual_seed(0)
    method = AMDIM(AMDIMConfig(projector_dim=16, terms=("1-5",)), TinyBackbone(), make_context(16))
    optimizer = torch.optim.Adam(method.parameters(), lr=0.01)
    top1 = []
    for step in range(60):
        base = make_batch(2, 16, seed=step, dtype=torch.float32)
        color = torch.randn(16, 3, 1, 1, generator=torch.Generator().manual_seed(step)) * 3
        output = method(base._replace(views=[view + color for view in base.views]), progress(step, 100))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        top1.append(float(output.metrics["top1_1_to_5"]))
    assert sum(top1[-10:]) / 10 > 2 * sum(top1[:5]) / 5


# One process = two processes


def _build(context: Any) -> AMDIM:
    return AMDIM(SMALL, TinyBackbone(), context)


def _train() -> dict[str, Any]:
    return train_steps(_build, 2, num_steps=3)


def test_two_processes_equal_one(tmp_path):
    one = train_steps(_build, 2, num_steps=3)
    for two in run_processes(_train, 2, tmp_path):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-8)


# State, precision, errors


@pytest.mark.parametrize("bf16", [False, True])
def test_three_steps_are_finite_and_every_parameter_has_a_gradient(bf16):
    method = _method().float()
    optimizer = build_optimizer(method, OPTIMIZER, 384)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            output = method(make_batch(2, seed=step, dtype=torch.float32), progress(step))
        assert output.loss.isfinite()
        assert output.loss.dtype == torch.float32
        assert {"feature_spread", "mean_cosine", "loss_5_to_5", "top1_1_to_5"} < set(output.metrics)
        assert all(value.isfinite() and not value.requires_grad for value in output.metrics.values())
        optimizer.zero_grad()
        output.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
        optimizer.step()
        method.after_step(progress(step))


def test_resumed_runs_draw_the_same_locations(tmp_path):
    method = _method()
    torch.save(method.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(9)
    other = AMDIM(SMALL, TinyBackbone(), make_context()).double()
    assert other.location_seed != method.location_seed
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    batch = make_batch(2)
    assert torch.equal(other(batch, progress(2)).loss, method(batch, progress(2)).loss)


def test_the_schedule_is_the_authors():
    rates = [learning_rate(OPTIMIZER, 384, epoch * 10, 8000, 10) for epoch in (0, 1, 5, 800)]
    assert rates == pytest.approx([0, 0.0002, 0.001, 0.000001])
    assert (OPTIMIZER.adam_beta1, OPTIMIZER.adam_beta2, OPTIMIZER.weight_decay) == (0.8, 0.999, 1e-5)
    assert (AMDIMConfig().tanh_clip, AMDIMConfig().regularizer_weight) == (30, 0.05)


@pytest.mark.parametrize(
    ("changes", "context", "message"),
    [
        ({"terms": ()}, {}, "terms.*1-5, 1-7, 5-5"),
        ({"terms": ("1-5", "1-5")}, {}, "each once"),
        ({"terms": ("5-7",)}, {}, "terms=.*5-7"),
        ({"tanh_clip": 0.0}, {}, "tanh_clip=0.0"),
        ({"regularizer_weight": -0.1}, {}, "regularizer_weight=-0.1"),
        ({"projector_dim": 0}, {}, "projector_dim=0"),
        ({}, {"num_micro_steps": 8}, "one image.*8 micro-steps"),
        ({}, {"feature_map_side": 1}, "Use larger images or the small stem"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes, context, message):
    with pytest.raises(ValueError, match=message):
        AMDIM.validate(replace(SMALL, **changes), make_context(**context))


def test_a_map_of_one_location_is_refused_when_it_was_not_known_before():
    method = _method()
    with pytest.raises(ValueError, match="single location"):
        method(make_batch(2, size=2), progress())


class _Unlisted(TinyBackbone):
    """Does something between its stages, like timm models."""

    def forward_features(self, x: Tensor) -> Tensor:
        return self.layer1(2 * self.stem(x))


class _Mismatched(TinyBackbone):
    @property
    def stages(self) -> list[nn.Module]:
        return [self.layer1, self.stem]


@pytest.mark.parametrize("backbone", [_Unlisted, _Mismatched])
def test_backbones_whose_stages_are_not_the_whole_are_refused(backbone):
    with pytest.raises(ValueError, match=r"stages of this backbone.*Choose one of resnet9"):
        AMDIM(SMALL, backbone(), make_context())
