"""The train loop without Ray: resuming, accumulation, divergence, probes, epoch 0."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import nn

import rayjobs.train_loop
from image_data.store import DecodedStore
from image_data.stream import MemoryStream, to_device
from methods import METHODS, StepOutput
from methods.optimizers import OptimizerConfig
from rayjobs.checkpoint import load_backbone, load_state
from rayjobs.configs import TrainConfig, preset, with_parameters
from rayjobs.job import view_recipes
from rayjobs.train_loop import TrainingDiverged, Worker, build_method, method_context, train
from tests.rayjobs.conftest import PlainReporter

pytestmark = pytest.mark.usefixtures("tiny_backbone")

SETTINGS = TrainConfig(backbone="resnet18", image_size=16, batch_size=32, epochs=3, checkpoint_every=1, stem="imagenet")
SMALL = {
    "queue_size": 64,
    "projector_dim": 16,
    "projector_hidden_dim": 32,
    "predictor_hidden_dim": 32,
    "num_negatives": 32,
    "num_prototypes": 20,
    "queue_start_epoch": 1,
    "latent_dim": 16,
}


def make_config(method, data_config, **changes):
    config = preset(method, dataclasses.replace(SETTINGS, **changes), data_config)
    fields = {f.name for f in dataclasses.fields(config.method_config)}
    return with_parameters(config, {"warmup_epochs": 0} | {k: v for k, v in SMALL.items() if k in fields})


def run(config, data, reporter, **arguments):
    info = data.split("train")
    settings = config.train
    store = DecodedStore.open(info, data.directory)
    stream = MemoryStream(
        store, view_recipes(config), image_size=settings.image_size, batch_size=settings.batch_size, seed=settings.seed
    )
    context = method_context(config, len(info.class_names), info.num_images)
    train(config, {"test": True}, context, stream, Worker(), reporter, **arguments)


@pytest.mark.parametrize("method", list(METHODS))
def test_resume_equals_uninterrupted(method, data, data_config, tmp_path):
    whole = PlainReporter(tmp_path / "whole")
    run(make_config(method, data_config), data, whole)
    part = PlainReporter(tmp_path / "part")

    class Killed(Exception):
        pass

    def die(metrics, save, report=part.report):
        report(metrics, save)
        if metrics["epoch"] == 2:
            raise Killed

    part.report = die
    with pytest.raises(Killed):
        run(make_config(method, data_config), data, part)
    again = PlainReporter(tmp_path / "part")
    run(make_config(method, data_config), data, again)
    assert [r["epoch"] for r in again.reports] == [3]
    assert again.reports[0]["loss"] == whole.reports[2]["loss"]
    assert again.reports[0]["curve"] == whole.reports[2]["curve"]
    one, two = (load_state(tmp_path / name / "epoch_00003") for name in ("whole", "part"))
    assert one["method"].keys() == two["method"].keys()
    for name, tensor in one["method"].items():
        assert torch.equal(tensor, two["method"][name]), name
    assert all(torch.isfinite(torch.tensor(r["loss"])) for r in whole.reports)


class _Phased(nn.Module):
    """Fits one weight in phase 0 and another in phase 1, which needs what each micro-step of phase 0 saw."""

    fixed_learning_rate = ()

    def __init__(self, backbone, num_phases):
        super().__init__()
        self.backbone = backbone
        self.a, self.b = (nn.Parameter(torch.tensor(value)) for value in (1.0, 2.0))
        self.kept, self.calls, self.steps = {}, [], []
        if num_phases is not None:
            self.num_phases = lambda progress: num_phases if progress.epoch > 0 else 1

    def forward(self, batch, progress):
        self.calls.append((progress.step, progress.phase, progress.micro_step))
        assert self.a.grad is None or progress.micro_step > 0, "gradients are not those of the phase before"
        mean = batch.views[0].mean()
        if progress.phase == 0:
            self.kept[progress.micro_step] = (mean, self.a.detach().clone())
            return StepOutput((self.a - mean) ** 2, {"first": self.a.detach()})
        seen, before = self.kept.pop(progress.micro_step)
        assert torch.equal(seen, mean)
        assert not torch.equal(before, self.a)
        return StepOutput((self.a - self.b) ** 2, {"second": self.b.detach()})

    def after_step(self, progress):
        self.steps.append((progress.step, progress.phase, progress.micro_step))


def _train_phased(num_phases, data, data_config, folder, monkeypatch, accumulate=1):
    built = []

    def build(config, context):
        torch.manual_seed(0)
        built.append(_Phased(rayjobs.train_loop.build_backbone(), num_phases))
        return built[0]

    monkeypatch.setattr(rayjobs.train_loop, "build_method", build)
    config = make_config("supervised", data_config, epochs=2, batch_size=64, accumulate=accumulate)
    plain_sgd = OptimizerConfig(learning_rate=0.1, scale_learning_rate=False, schedule="constant", sgd_momentum=0.0)
    reporter = PlainReporter(folder)
    run(dataclasses.replace(config, optimizer=plain_sgd), data, reporter)
    return built[0], reporter


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_phase_ends_with_an_optimiser_step(accumulate, data, data_config, tmp_path, monkeypatch):
    method, reporter = _train_phased(2, data, data_config, tmp_path, monkeypatch, accumulate)
    steps = len(method.steps) // 2
    phases = [(step, phase) for step in range(2 * steps) for phase in range(2 if step >= steps else 1)]
    assert method.calls == [(step, phase, m) for step, phase in phases for m in range(accumulate)]
    assert method.steps == [(step, int(step >= steps), accumulate - 1) for step in range(2 * steps)]
    first, second = (dict(r) for r in reporter.reports)
    assert "second" not in first
    assert 0.0 < second["second"] <= 2.0  # the mean over micro-steps
    assert not method.kept


def test_loss_is_the_sum_over_the_phases(data, data_config, tmp_path, monkeypatch):
    method, reporter = _train_phased(2, data, data_config, tmp_path / "two", monkeypatch)
    expected, decay, a, b = [], 1 - 0.1 * 1e-4, 1.0, 2.0
    info = data.split("train")
    config = make_config("supervised", data_config, epochs=2, batch_size=64)
    settings = config.train
    store = DecodedStore.open(info, data.directory)
    stream = MemoryStream(store, view_recipes(config), image_size=settings.image_size, batch_size=64, seed=0)
    for epoch in range(2):
        losses = []
        for batch in stream.epoch(epoch):
            mean = float(to_device(batch, torch.device("cpu"))[0][0].mean())
            loss, a = (a - mean) ** 2, decay * a - 0.1 * 2 * (a - mean)
            if epoch > 0:
                loss += (a - b) ** 2
                a, b = decay * a - 0.1 * 2 * (a - b), decay * b + 0.1 * 2 * (a - b)
            losses.append(loss)
        expected.append(sum(losses) / len(losses))
    assert [r["loss"] for r in reporter.reports] == pytest.approx(expected, rel=1e-4)
    assert method.a.item() == pytest.approx(a, rel=1e-4)
    assert method.b.item() == pytest.approx(b, rel=1e-4)


def test_one_phase_is_the_same_as_none(data, data_config, tmp_path, monkeypatch):
    reports = []
    for num_phases in (None, 1):
        _, reporter = _train_phased(num_phases, data, data_config, tmp_path / str(num_phases), monkeypatch)
        reports.append([(r["loss"], r["first"], r["curve"]) for r in reporter.reports])
    assert reports[0] == reports[1]


def test_resuming_a_method_of_two_phases(data, data_config, tmp_path):
    """CAMtrast's released code keeps features between its phases, nothing between batches."""

    def config():
        return with_parameters(make_config("camtrast_simsiam", data_config, accumulate=2), {"variant": "code"})

    whole, part = PlainReporter(tmp_path / "whole"), PlainReporter(tmp_path / "part")
    run(config(), data, whole)
    report = part.report

    def die(metrics, save):
        report(metrics, save)
        if metrics["epoch"] == 2:
            raise InterruptedError

    part.report = die
    with pytest.raises(InterruptedError):
        run(config(), data, part)
    part.report = report
    run(config(), data, part)
    assert part.reports[-1]["loss"] == whole.reports[-1]["loss"]
    assert {"loss_original", "loss_suppressed", "loss_self"} <= set(whole.reports[-1])
    one, two = (load_state(tmp_path / name / "epoch_00003")["method"] for name in ("whole", "part"))
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def test_a_finished_run_reports_its_last_metrics_again(data, data_config, tmp_path):
    config = make_config("supervised", data_config, epochs=1)
    first = PlainReporter(tmp_path)
    run(config, data, first)
    second = PlainReporter(tmp_path)
    run(config, data, second)
    assert second.reports == first.reports


def test_resume_with_another_configuration_is_refused(data, data_config, tmp_path):
    run(make_config("supervised", data_config, epochs=1), data, PlainReporter(tmp_path))
    with pytest.raises(ValueError, match="another configuration"):
        run(make_config("supervised", data_config, epochs=2), data, PlainReporter(tmp_path))


def test_epoch_zero_saves_the_random_backbone(data, data_config, tmp_path):
    config = make_config("moco_v2", data_config, epochs=0)
    reporter = PlainReporter(tmp_path)
    run(config, data, reporter)
    assert [r["epoch"] for r in reporter.reports] == [0]
    backbone, stored, record = load_backbone(tmp_path / "epoch_00000")
    assert stored == config
    assert record["test"] is True
    info = data.split("train")
    fresh = build_method(config, method_context(config, len(info.class_names), info.num_images)).backbone
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, backbone.state_dict()[name])


def test_divergence_names_the_step(data, data_config, tmp_path):
    config = with_parameters(make_config("supervised", data_config), {"learning_rate": 1e20})
    with pytest.raises(TrainingDiverged, match=r"supervised.*NaN or infinite in step \d+ \(epoch 0\)"):
        run(config, data, PlainReporter(tmp_path))
    assert not list(tmp_path.glob("epoch_*")), "a diverged state must not be saved"


def test_accumulation_keeps_queue_and_steps(data, data_config, tmp_path):
    """Two micro-steps see the same images in the same order and leave the same queue labels as one step."""
    states = []
    for accumulate in (1, 2):
        reporter = PlainReporter(tmp_path / str(accumulate))
        run(make_config("exemplar_v2", data_config, epochs=1, accumulate=accumulate), data, reporter)
        states.append(load_state(tmp_path / str(accumulate) / "epoch_00001"))
    for name in states[0]["method"]:
        if "queue" in name and not states[0]["method"][name].is_floating_point():
            assert torch.equal(states[0]["method"][name], states[1]["method"][name]), name


def test_probe_runs_at_its_epochs_and_leaves_no_trace(data, data_config, tmp_path):
    config = make_config("supervised", data_config)
    plain = PlainReporter(tmp_path / "plain")
    run(config, data, plain)
    seen = []

    def probe(backbone, epoch):
        seen.append(epoch)
        backbone.eval()
        torch.rand(3)
        return {"proxy": float(epoch)}

    probed = PlainReporter(tmp_path / "probed")
    run(config, data, probed, probe=probe, probe_epochs=(1, 3))
    assert seen == [1, 3]
    assert [r.get("proxy") for r in probed.reports] == [1.0, None, 3.0]
    assert [r["loss"] for r in plain.reports] == [r["loss"] for r in probed.reports]


def test_checkpoints_every_k_epochs_and_at_the_end(data, data_config, tmp_path):
    run(make_config("supervised", data_config, checkpoint_every=2), data, PlainReporter(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["epoch_00002", "epoch_00003"]
    stored = json.loads((tmp_path / "epoch_00003" / "config.json").read_text())
    assert stored["record"]["epoch"] == 3
