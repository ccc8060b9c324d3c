"""The train loop without Ray: resuming, accumulation, divergence, probes, epoch 0."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from image_data.store import DecodedStore
from image_data.stream import MemoryStream
from methods import METHODS
from rayjobs.checkpoint import load_backbone, load_state
from rayjobs.configs import TrainConfig, preset, with_parameters
from rayjobs.job import view_recipes
from rayjobs.train_loop import TrainingDiverged, Worker, build_method, method_context, train
from tests.rayjobs.conftest import PlainReporter

pytestmark = pytest.mark.usefixtures("tiny_backbone")

SETTINGS = TrainConfig(backbone="resnet18", image_size=16, batch_size=32, epochs=3, checkpoint_every=1, stem="imagenet")
SMALL = {"queue_size": 64, "projector_dim": 16, "projector_hidden_dim": 32}


def make_config(method, data_config, **changes):
    config = preset(method, dataclasses.replace(SETTINGS, **changes), data_config)
    fields = {f.name for f in dataclasses.fields(config.method_config)}
    return with_parameters(config, {k: v for k, v in SMALL.items() if k in fields})


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
