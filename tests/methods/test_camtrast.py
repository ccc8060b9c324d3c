"""CAM arithmetic on planted maps and slow formulas; both CAMtrast variants term by term; what must not be touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from image_data.contracts import IMAGENET_MEAN, IMAGENET_STD
from methods import cam
from methods.cam import class_activation_map, normalized_mask, suppress
from methods.camtrast import (
    CamtrastMoCo,
    CamtrastMoCoConfig,
    CamtrastSimSiam,
    CamtrastSimSiamConfig,
)
from methods.camtrast_parts import warmup_epochs
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress

MOCO = CamtrastMoCoConfig(
    cam_warmup_epochs=1, queue_size=16, projector_dim=5, projector_hidden_dim=6, momentum=0.9, shuffle_bn=False
)
SIMSIAM = CamtrastSimSiamConfig(cam_warmup_epochs=1, projector_hidden_dim=7, projector_dim=6, predictor_hidden_dim=3)
WARMUP, MAIN = progress(0), progress(1)


def _moco(config: CamtrastMoCoConfig = MOCO) -> CamtrastMoCo:
    torch.manual_seed(0)
    return CamtrastMoCo(config, TinyBackbone(), make_context()).double()


def _simsiam(config: CamtrastSimSiamConfig = SIMSIAM) -> CamtrastSimSiam:
    torch.manual_seed(0)
    return CamtrastSimSiam(config, TinyBackbone(), make_context()).double()


# CAM arithmetic


def test_cam_is_the_weighted_sum_of_the_maps():
    features, weight = torch.randn(3, 5, 2, 4), torch.randn(7, 5)
    classes = torch.tensor([6, 0, 6])
    ours = class_activation_map(features, weight, classes)
    for b in range(3):
        for u in range(2):
            for v in range(4):
                expected = sum(float(weight[classes[b], k]) * float(features[b, k, u, v]) for k in range(5))
                assert ours[b, u, v].item() == pytest.approx(expected, abs=1e-5)


def test_mask_finds_a_planted_object():
    features = torch.zeros(2, 3, 4, 4)
    features[0, 1, 0, 3] = 2.0  # channel 1 fires at the top right
    features[1, 1, 2, 1] = -2.0  # and is inhibited here: the rest is fully suppressed
    weight = torch.tensor([[9.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    mask, is_constant = normalized_mask(class_activation_map(features, weight, torch.tensor([1, 1])), (8, 8))
    assert not is_constant.any()
    assert mask.shape == (2, 1, 8, 8)
    assert mask[0, 0, 0, 7] == 1
    assert (mask[0, 0, 3:] == 0).all()
    assert (mask[0, 0, :, :5] == 0).all()
    assert mask[1, 0, 7, 7] == 1
    assert mask[1, 0, 4:6, 2:4].max() < 0.5


def _bilinear(row: list[list[float]], height: int, width: int, y: int, x: int) -> float:
    """Value of a small map at one pixel of the enlarged image: half-pixel centres, edges repeated."""

    def position(i: int, out: int, size: int) -> tuple[int, int, float]:
        source = min(max((i + 0.5) * size / out - 0.5, 0), size - 1)
        low = int(source)
        return low, min(low + 1, size - 1), source - low

    top, bottom, fy = position(y, height, len(row))
    left, right, fx = position(x, width, len(row[0]))
    upper = row[top][left] * (1 - fx) + row[top][right] * fx
    lower = row[bottom][left] * (1 - fx) + row[bottom][right] * fx
    return upper * (1 - fy) + lower * fy


def test_mask_is_upsampled_then_scaled():
    maps = torch.randn(2, 3, 3, dtype=torch.float64)
    mask, _ = normalized_mask(maps, (7, 10))
    for b in range(2):
        up = [[_bilinear(maps[b].tolist(), 7, 10, y, x) for x in range(10)] for y in range(7)]
        low, high = min(map(min, up)), max(map(max, up))
        expected = (torch.tensor(up, dtype=torch.float64) - low) / (high - low)
        torch.testing.assert_close(mask[b, 0], expected)
    assert mask.amin() == 0
    assert mask.amax() == 1


@pytest.mark.parametrize("value", [0.0, 3.7, -1e4])
def test_constant_maps_suppress_nothing(value):
    maps = torch.full((2, 3, 3), value)
    maps[1, 1, 1] *= 1 + 1e-7  # rounding, not a peak
    mask, is_constant = normalized_mask(maps, (9, 9))
    assert is_constant.all()
    assert (mask == 0).all()
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(suppress(images, mask, "mean_color"), images)


def test_suppressed_to_mean_color_or_black():
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (cam.MEAN, cam.STD))
    images = (pixels - mean) / std
    mask = torch.rand(2, 1, 4, 4, dtype=torch.float64)
    to_black = suppress(images, mask, "black") * std + mean
    torch.testing.assert_close(to_black, pixels * (1 - mask))
    to_mean = suppress(images, mask, "mean_color") * std + mean
    torch.testing.assert_close(to_mean, pixels * (1 - mask) + mean * mask)


def test_normalisation_is_that_of_the_views():
    assert (cam.MEAN, cam.STD) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("to", ["mean_color", "black"])
def test_suppressed_images_keep_dtype_and_memory_format(to):
    images = torch.randn(2, 3, 4, 4).bfloat16().to(memory_format=torch.channels_last)
    result = suppress(images, torch.rand(2, 1, 4, 4), to)
    assert result.dtype == torch.bfloat16
    assert result.is_contiguous(memory_format=torch.channels_last)


# Both variants, term by term


def _expected_parts(method) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both cross entropies, pooled x and the suppressed images, on a copy so that no statistics move."""
    batch = make_batch(1)
    (x,) = batch.views
    features = method.backbone.forward_features(x)
    weight, bias = method.classifier.weight, method.classifier.bias
    suppressed = []
    for b in range(8):
        raw = (weight[batch.labels[b]][:, None, None] * features[b]).sum(0)
        up = F.interpolate(raw[None, None], size=(8, 8), mode="bilinear")[0, 0]
        suppressed.append(x[b] * (1 - (up - up.min()) / (up.max() - up.min())))
    x_suppressed = torch.stack(suppressed).detach()
    pooled = features.mean((2, 3))
    ce_x = F.cross_entropy(pooled @ weight.T + bias, batch.labels)
    pooled_suppressed = method.backbone(x_suppressed)
    ce_suppressed = F.cross_entropy(pooled_suppressed @ weight.T + bias, batch.labels)
    return ce_x + ce_suppressed, pooled, x_suppressed, pooled_suppressed


def test_camtrast_simsiam_loss_and_gradients():
    ours, slow = _simsiam(), _simsiam()
    loss = ours(make_batch(1), MAIN).loss
    cross_entropies, pooled, _, pooled_suppressed = _expected_parts(slow)
    z = slow.projector(pooled).detach()
    prediction = slow.predictor(slow.projector(pooled_suppressed))
    expected = cross_entropies - (prediction * z).sum(1).div(prediction.norm(dim=1) * z.norm(dim=1)).mean()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    _assert_same_gradients(ours, slow)


def test_camtrast_moco_loss_and_gradients():
    ours, slow = _moco(), _moco()
    with torch.no_grad():  # make the two encoders differ
        for method in (ours, slow):
            for p in method.momentum_encoder.parameters():
                p.mul_(1.3)
    loss = ours(make_batch(1), MAIN).loss
    with torch.no_grad():
        online = [*slow.backbone.parameters(), *slow.projector.parameters()]
        for key_p, p in zip(slow.momentum_encoder.parameters(), online, strict=True):
            key_p.copy_(0.9 * key_p + 0.1 * p)
    cross_entropies, pooled, x_suppressed, _ = _expected_parts(slow)
    q = F.normalize(slow.projector(pooled), dim=1)
    k = F.normalize(slow.momentum_encoder(x_suppressed), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ slow.queue.keys.T], dim=1) / 0.2
    expected = cross_entropies + F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    _assert_same_gradients(ours, slow)
    ours.after_step(MAIN)
    torch.testing.assert_close(ours.queue.keys[:8], k)  # keys of the suppressed images
    assert torch.equal(ours.queue.index[:8], make_batch(1).index)


def _assert_same_gradients(ours: nn.Module, slow: nn.Module) -> None:
    named = dict(slow.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, named[name].grad, msg=lambda m, n=name: f"{n}: {m}")
        else:
            assert p.grad is None


@pytest.mark.parametrize("build", [_moco, _simsiam])
def test_warmup_is_plain_cross_entropy(build):
    method, slow = build(), build()
    batch = make_batch(1)
    output = method(batch, WARMUP)
    output.loss.backward()
    method.after_step(WARMUP)
    expected = F.cross_entropy(slow.classifier(slow.backbone(batch.views[0])), batch.labels)
    torch.testing.assert_close(output.loss, expected)
    with_gradient = {name.split(".")[0] for name, p in method.named_parameters() if p.grad is not None}
    assert with_gradient == {"backbone", "classifier"}
    assert method.has_unused_parameters
    if build is _moco:
        assert (method.queue.index == -1).all()


def test_momentum_encoder_follows_during_the_warmup():
    method = _moco()
    with torch.no_grad():
        for p in method.backbone.parameters():
            p.add_(1.0)
    before = [p.clone() for p in method.momentum_encoder.parameters()]
    method(make_batch(1), WARMUP)
    online = [*method.backbone.parameters(), *method.projector.parameters()]
    for now, old, p in zip(method.momentum_encoder.parameters(), before, online, strict=True):
        torch.testing.assert_close(now, 0.9 * old + 0.1 * p.detach())


@pytest.mark.parametrize("build", [_moco, _simsiam])
def test_batchnorm_is_updated_once_for_x_and_once_for_the_suppressed_image(build):
    method = build()
    seen: list[Tensor] = []
    norm = method.backbone.stem[1]
    norm.register_forward_hook(lambda _, args, __: seen.append(args[0].detach()))
    method(make_batch(1), MAIN)
    assert len(seen) == 2
    assert norm.num_batches_tracked == 2
    mean = torch.zeros(6, dtype=torch.float64)
    for x in seen:
        mean = 0.9 * mean + 0.1 * x.mean((0, 2, 3))
    torch.testing.assert_close(norm.running_mean, mean)


@pytest.mark.parametrize("build", [_moco, _simsiam])
def test_no_gradient_flows_through_the_mask(build):
    # With CE(x) and CE(x') switched off by a zero upstream gradient, W could only be reached through the mask.
    method = build()
    output = method(make_batch(1), MAIN)
    without_cross_entropy = output.loss - _cross_entropies(method, make_batch(1))
    (gradient,) = torch.autograd.grad(without_cross_entropy, method.classifier.weight, allow_unused=True)
    torch.testing.assert_close(gradient, torch.zeros_like(method.classifier.weight))


def _cross_entropies(method, batch) -> Tensor:
    (x,) = batch.views
    features = method.backbone.forward_features(x)
    mask, _ = normalized_mask(class_activation_map(features, method.classifier.weight, batch.labels), (8, 8))
    pooled = (features.mean((2, 3)), method.backbone(suppress(x, mask, "mean_color")))
    return sum(F.cross_entropy(method.classifier(f), batch.labels) for f in pooled)  # type: ignore[return-value]


def test_suppress_to_changes_the_loss():
    losses = [_simsiam(replace(SIMSIAM, suppress_to=to))(make_batch(1), MAIN).loss for to in ("mean_color", "black")]
    assert abs(losses[0] - losses[1]) > 1e-6


def test_monitors_carry_no_graph():
    for method in (_moco(), _simsiam()):
        for name, value in method(make_batch(1), MAIN).metrics.items():
            assert value.dim() == 0, name
            assert not value.requires_grad, name


def test_accumulated_steps_update_the_encoder_and_the_queue_once():
    method = _moco(replace(MOCO, cam_warmup_epochs=0))
    batch = make_batch(1)
    updates = []
    update = method.momentum_encoder.update
    method.momentum_encoder.update = lambda *args: (updates.append(1), update(*args))  # type: ignore[method-assign]
    for m in range(2):
        part = slice(4 * m, 4 * m + 4)
        micro = batch._replace(views=[batch.views[0][part]], labels=batch.labels[part], index=batch.index[part])
        method(micro, progress(0, micro_step=m, num_micro_steps=2))
        assert (method.queue.index == -1).all()
    method.after_step(progress(0, micro_step=1, num_micro_steps=2))
    assert len(updates) == 1
    assert torch.equal(method.queue.index[:8], batch.index)


def test_warmup_length():
    default = CamtrastSimSiamConfig()
    assert [warmup_epochs(default, n) for n in (1, 2, 20, 100, 1000)] == [0, 1, 1, 3, 30]
    assert warmup_epochs(SIMSIAM, 2) == 1
    with pytest.raises(ValueError, match="leaves nothing of a run of 10 epochs"):
        warmup_epochs(replace(default, cam_warmup_epochs=30), 10)


class _OnePixel(TinyBackbone):
    def forward_features(self, x: Tensor) -> Tensor:
        return super().forward_features(x).mean((2, 3), keepdim=True)


@pytest.mark.parametrize(
    ("kind", "config", "context", "message"),
    [
        (CamtrastMoCo, MOCO, {"num_classes": 1}, "at least 2 classes"),
        (CamtrastMoCo, replace(MOCO, queue_size=17), {}, "multiple of the global batch"),
        (CamtrastMoCo, replace(MOCO, temperature=0.0), {}, "temperature"),
        (CamtrastMoCo, replace(MOCO, cam_warmup_epochs=-1), {}, "cam_warmup_epochs=-1"),
        (CamtrastSimSiam, replace(SIMSIAM, projector_dim=0), {}, "at least 1"),
        (CamtrastSimSiam, SIMSIAM, {"feature_map_side": 1}, "Use larger images or the small stem"),
        (CamtrastSimSiam, SIMSIAM, {"num_classes": 1}, "at least 2 classes"),
        (CamtrastSimSiam, replace(SIMSIAM, suppress_to="white"), {}, "mean_color, black"),
    ],
)
def test_settings_that_cannot_train_are_refused(kind, config, context, message):
    with pytest.raises(ValueError, match=message):
        kind.validate(config, make_context(**context))


def test_a_map_of_one_location_is_refused():
    method = CamtrastSimSiam(SIMSIAM, _OnePixel(), make_context())
    with pytest.raises(ValueError, match="small stem or larger images"):
        method(make_batch(1, dtype=torch.float32), MAIN)


@pytest.mark.parametrize("build", [_moco, _simsiam])
def test_two_views_are_refused(build):
    with pytest.raises(ValueError, match=r"second view itself.*takes 1 view of each image, but the data has 2"):
        build()(make_batch(2), MAIN)
