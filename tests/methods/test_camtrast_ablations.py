"""The ablations of CAMtrast against their written-out losses; no forward pass that they do not need."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import camtrast_parts
from methods.camtrast_ablations import (
    CamtrastCAMOnly,
    CamtrastCAMOnlyConfig,
    CamtrastContrastOnlyMoCo,
    CamtrastContrastOnlyMoCoConfig,
    CamtrastContrastOnlySimSiam,
    CamtrastContrastOnlySimSiamConfig,
)
from methods.contracts import Batch, Method, MethodContext
from tests.methods.distributed import run_processes
from tests.methods.examples import TinyBackbone, make_batch, make_context, progress
from tests.methods.phases import advance, make_optimizer, slow_suppressed, train_phases

WARMUP, MAIN = progress(0), progress(1)
HEADS = {"projector_hidden_dim": 7, "projector_dim": 6}
MOCO = CamtrastContrastOnlyMoCoConfig(1, queue_size=16, momentum=0.9, shuffle_bn=False, **HEADS)
SIMSIAM = CamtrastContrastOnlySimSiamConfig(1, predictor_hidden_dim=3, **HEADS)
CONFIGS: dict[str, tuple[type, Any]] = {
    "cam_only": (CamtrastCAMOnly, CamtrastCAMOnlyConfig(1, sync_batchnorm=True)),
    "moco": (CamtrastContrastOnlyMoCo, MOCO),
    "moco_augmented": (CamtrastContrastOnlyMoCo, dataclasses.replace(MOCO, second_view="augmented")),
    "simsiam": (CamtrastContrastOnlySimSiam, SIMSIAM),
    "simsiam_augmented": (CamtrastContrastOnlySimSiam, dataclasses.replace(SIMSIAM, second_view="augmented")),
}


def _num_views(name: str) -> int:
    return 2 if name.endswith("augmented") else 1


def _build(name: str) -> Any:
    torch.manual_seed(0)
    kind, config = CONFIGS[name]
    return kind(config, TinyBackbone(), make_context()).double().train()


def _ce(method: Any, pooled: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(pooled @ method.classifier.weight.T + method.classifier.bias, labels)


def _slow_loss(name: str, method: Any, batch: Batch) -> Tensor:
    """The terms of Table 5, with the modules of `method`."""
    x, labels = batch.views[0], batch.labels
    features = method.backbone.forward_features(x)
    pooled = features.mean((2, 3))
    loss = _ce(method, pooled, labels)
    if name.endswith("augmented"):
        x_second = batch.views[1]
    else:
        x_second = slow_suppressed(x, features, method.classifier.weight, labels, scale_first=False)
    if name == "cam_only":
        return loss + _ce(method, method.backbone(x_second), labels)
    if name.startswith("simsiam"):
        z = method.projector(pooled).detach()
        p = method.predictor(method.projector(method.backbone(x_second)))
        return loss - ((p * z).sum(1) / (p.norm(dim=1) * z.norm(dim=1))).mean()
    with torch.no_grad():
        online = [*method.backbone.parameters(), *method.projector.parameters()]
        for key_p, p in zip(method.momentum_encoder.parameters(), online, strict=True):
            key_p.copy_(0.9 * key_p + 0.1 * p)
    q = F.normalize(method.projector(pooled), dim=1)
    k = F.normalize(method.momentum_encoder(x_second), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ method.queue.keys.T], dim=1) / 0.2
    return loss + F.cross_entropy(logits, torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("name", CONFIGS)
def test_loss_gradients_and_statistics(name):
    ours, slow = _build(name), _build(name)
    batch = make_batch(_num_views(name), seed=1)
    loss, expected = ours(batch, MAIN).loss, _slow_loss(name, slow, batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    named = dict(slow.named_parameters())
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, named[key].grad, msg=lambda m, n=key: f"{n}: {m}")
    # As many passes of each part as the formula has, no more: BatchNorm counts them.
    torch.testing.assert_close(dict(ours.state_dict()), dict(slow.state_dict()))
    assert isinstance(ours, Method)


@pytest.mark.parametrize("name", CONFIGS)
def test_warmup_is_plain_cross_entropy(name):
    method, slow = _build(name), _build(name)
    batch = make_batch(_num_views(name), seed=1)
    output = method(batch, WARMUP)
    torch.testing.assert_close(output.loss, _ce(slow, slow.backbone(batch.views[0]), batch.labels))
    output.loss.backward()
    method.after_step(WARMUP)
    assert {key.split(".")[0] for key, p in method.named_parameters() if p.grad is not None} == {
        "backbone",
        "classifier",
    }
    assert getattr(method, "has_unused_parameters", False) == (name != "cam_only")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_cam_is_computed_only_where_it_is_needed(name, monkeypatch):
    seen = []

    def count(*arguments):
        seen.append(arguments)
        return cam(*arguments)

    cam = camtrast_parts.class_activation_map
    monkeypatch.setattr(camtrast_parts, "class_activation_map", count)
    metrics = _build(name)(make_batch(_num_views(name)), MAIN).metrics
    assert len(seen) == (0 if name.endswith("augmented") else 1)
    assert ("suppressed_share" in metrics) == bool(seen)
    assert ("loss_suppressed" in metrics) == (name == "cam_only")
    for value in metrics.values():
        assert value.dim() == 0
        assert not value.requires_grad


@pytest.mark.parametrize("name", CONFIGS)
def test_online_network_sees_no_second_view_that_only_needs_keys(name):
    method = _build(name)
    method(make_batch(_num_views(name)), MAIN)
    assert method.backbone.stem[1].num_batches_tracked == (1 if name.startswith("moco") else 2)


@pytest.mark.parametrize("name", CONFIGS)
def test_resuming_from_state_dicts_is_bit_equal(name):
    straight, num_views = _build(name), _num_views(name)
    optimizer = make_optimizer(straight)
    advance(straight, optimizer, num_views, range(2))
    stored = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    expected = advance(straight, optimizer, num_views, range(2, 4))
    torch.manual_seed(99)
    resumed = CONFIGS[name][0](CONFIGS[name][1], TinyBackbone(), make_context()).double().train()
    optimizer = make_optimizer(resumed)
    resumed.load_state_dict(stored[0])
    optimizer.load_state_dict(stored[1])
    assert advance(resumed, optimizer, num_views, range(2, 4)) == expected
    for key, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key


def _in_context(name: str, context: MethodContext) -> Any:
    kind, config = CONFIGS[name]
    if name.startswith("moco"):  # two BatchNorm groups: two workers, or two splits in one
        config = dataclasses.replace(config, shuffle_bn=True, bn_splits=2 // context.world_size)
    return kind(config, TinyBackbone(), context)


def _train_all() -> dict[str, Any]:
    return {name: train_phases(lambda c, n=name: _in_context(n, c), _num_views(name)) for name in CONFIGS}


def test_two_processes_equal_one(tmp_path):
    one = _train_all()
    for two in run_processes(_train_all, 2, tmp_path):
        for name in CONFIGS:
            for state in (one[name]["state"], two[name]["state"]):  # statistics are each worker's own in MoCo
                for key in [k for k in state if name.startswith("moco") and "running" in k]:
                    del state[key]
            assert set(two[name]["state"]) == set(one[name]["state"])
            torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cam_only", 2, r"cam_only makes its second view itself.*takes 1 view of each image, but the data has 2"),
        ("moco", 2, r"second_view='suppressed' makes its second view itself.*but the data has 2.*\(--views light\)"),
        ("simsiam", 2, r"second_view='suppressed' makes its second view itself.*but the data has 2"),
        ("moco_augmented", 1, r"augmented'.*takes 2 views of each image, but the data has 1.*\(--views light light\)"),
        ("simsiam_augmented", 3, r"augmented'.*takes 2 views of each image, but the data has 3"),
    ],
)
def test_another_number_of_views_is_refused(name, given, message):
    for at in (WARMUP, MAIN):
        with pytest.raises(ValueError, match=message):
            _build(name)(make_batch(given), at)


@pytest.mark.parametrize(
    ("name", "changes", "context", "message"),
    [
        ("cam_only", {}, {"num_classes": 1}, "camtrast_cam_only learns from labels"),
        ("cam_only", {"suppress_to": "white"}, {}, "mean_color, black"),
        ("cam_only", {}, {"feature_map_side": 1}, "needs a class activation map"),
        ("moco", {"second_view": "plain"}, {}, "second_view='plain' must be one of: suppressed, augmented"),
        ("moco", {"queue_size": 17}, {}, "multiple of the global batch"),
        ("moco", {}, {"feature_map_side": 1}, "needs a class activation map"),
        ("moco_augmented", {"cam_warmup_epochs": -1}, {}, "cam_warmup_epochs=-1"),
        ("simsiam", {"projector_dim": 0}, {}, "at least 1"),
        ("simsiam", {"second_view": ""}, {}, "second_view=''"),
    ],
)
def test_settings_that_cannot_train_are_refused(name, changes, context, message):
    kind, config = CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        kind.validate(dataclasses.replace(config, **changes), make_context(**context))


def test_an_option_without_effect_warns():
    for name in ("moco_augmented", "simsiam_augmented"):
        kind, config = CONFIGS[name]
        with pytest.warns(UserWarning, match="suppress_to has no effect with second_view='augmented'"):
            kind.validate(dataclasses.replace(config, suppress_to="black"), make_context())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            kind.validate(config, make_context(feature_map_side=1))  # needs no map


def test_configs_have_the_fields_of_their_method():
    names = {kind: {f.name for f in dataclasses.fields(config)} for kind, config in CONFIGS.values()}
    assert names[CamtrastCAMOnly] == {"cam_warmup_epochs", "suppress_to", "sync_batchnorm"}
    for kind, field in (
        (CamtrastContrastOnlyMoCo, "queue_size"),
        (CamtrastContrastOnlySimSiam, "predictor_hidden_dim"),
    ):
        assert {"second_view", field} < names[kind]
        assert "variant" not in names[kind]
