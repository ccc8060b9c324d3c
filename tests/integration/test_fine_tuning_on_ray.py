"""Fine-tuning runs as Ray Train jobs and as Ray tasks give what this process gives, and go on after an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation.fine_tuning import Run, Schedule
from evaluation.fine_tuning.loop import STATE, FineTuningDiverged
from image_data.prepare import DataConfig, prepare
from methods.backbones import build_backbone
from rayjobs.checkpoint import save_checkpoint
from rayjobs.configs import TrainConfig, preset
from rayjobs.fine_tuning_runs import RunsPlan, fine_tuning_of, weights_hash
from rayjobs.record import run_record
from rayjobs.task_data import TaskData
from tests.evaluation.fine_tuning.samples import URI
from tests.evaluation.fine_tuning.test_loop import _Problem

PROBLEM = _Problem(Schedule(4, 4, 0.001), evaluate_at=(2,))
RUN = Run("seed0", "color", PROBLEM, "val")


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> RunsPlan:
    """A checkpoint of a random ResNet-9 and rendered data."""
    root = tmp_path_factory.mktemp("fine-tuning")
    config = DataConfig((URI,), cache=str(root / "cache"))
    data = prepare(config, log=lambda _: None)
    settings = TrainConfig(backbone="resnet9", stem="small", image_size=32, batch_size=8, epochs=0, num_workers=2)
    torch.manual_seed(7)
    run = preset("supervised", settings, config)
    save_checkpoint(root / "checkpoint", run, run_record(run, data), build_backbone("resnet9", "small").eval())
    checkpoint = str(root / "checkpoint")
    return RunsPlan(checkpoint, run, weights_hash(checkpoint), settings, TaskData(config, data), {})


def _same(one: Any, other: Any) -> None:
    np.testing.assert_allclose(one.losses, other.losses, rtol=2e-4)
    assert set(one.predictions) == set(other.predictions)
    np.testing.assert_allclose(one.last["colors"], other.last["colors"], atol=2e-3)


def test_a_train_job_of_two_workers_equals_this_process_and_is_not_repeated(
    ray_cluster: Any, plan: RunsPlan, tmp_path: Path
) -> None:
    here = fine_tuning_of(plan).results([RUN])[0]
    seen: list[dict[str, Any]] = []
    on_cluster = replace(plan, on_cluster=True, storage=str(tmp_path / "runs"))
    there = fine_tuning_of(on_cluster, lambda run, metrics: seen.append(dict(metrics))).results([RUN])[0]
    _same(there, here)
    assert [item["iteration"] for item in seen] == [1, 2, 3, 4]
    folders = list((tmp_path / "runs").iterdir())
    assert [path.name for folder in folders for path in folder.iterdir()] == ["result.npz"]
    again = fine_tuning_of(on_cluster, lambda *_: pytest.fail("it was trained again")).results([RUN])[0]
    np.testing.assert_array_equal(again.losses, there.losses)
    np.testing.assert_array_equal(again.predictions[2]["colors"], there.predictions[2]["colors"])


def test_spread_runs_equal_this_process(ray_cluster: Any, plan: RunsPlan, tmp_path: Path) -> None:
    runs = [RUN, replace(RUN, name="scratch", initial="random"), replace(RUN, name="seed1", seed=1)]
    here = fine_tuning_of(plan).results(runs)
    there = fine_tuning_of(replace(plan, on_cluster=True, storage=str(tmp_path))).results(runs, spread=True)
    for one, other in zip(there, here, strict=True):
        _same(one, other)
    assert abs(here[0].losses[0, 1] - here[1].losses[0, 1]) > 1e-4  # the checkpoint's weights against fresh ones


def test_divergence_on_the_cluster_ends_the_run_with_its_message(ray_cluster: Any, plan: RunsPlan) -> None:
    run = replace(RUN, problem=replace(PROBLEM, bias=float("nan")))
    with pytest.raises(FineTuningDiverged, match=r"color \(seed0\) became NaN or infinite at iteration 1 of 4"):
        fine_tuning_of(replace(plan, on_cluster=True)).results([run], spread=True)


def test_an_interrupted_run_goes_on_from_its_checkpoint(plan: RunsPlan, tmp_path: Path) -> None:
    """In this process: stopped by an exception in the display, as by Ctrl-C."""
    kept = replace(plan, storage=str(tmp_path))

    def stop(run: Run, metrics: Any) -> None:
        if metrics["iteration"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tuning_of(kept, stop).results([RUN])
    assert [path.name for path in tmp_path.glob("*/*")] == [STATE]
    seen: list[int] = []
    result = fine_tuning_of(kept, lambda run, metrics: seen.append(metrics["iteration"])).results([RUN])[0]
    assert seen == [4]
    np.testing.assert_array_equal(result.losses, fine_tuning_of(plan).results([RUN])[0].losses)


def test_other_settings_are_other_runs(plan: RunsPlan, tmp_path: Path) -> None:
    kept = replace(plan, storage=str(tmp_path))
    short = replace(RUN, problem=replace(PROBLEM, schedule=Schedule(1, 4, 0.01), evaluate_at=()))
    changed = [
        (kept, short),
        (replace(kept, weights="other"), short),
        (kept, replace(short, seed=1)),
        (kept, replace(short, phase="test")),
        (kept, replace(short, problem=replace(short.problem, bias=0.5))),
    ]
    for own, run in changed:
        fine_tuning_of(own).results([run])
    assert len(list(tmp_path.iterdir())) == len(changed)
    fine_tuning_of(replace(kept, weights="other")).results([replace(short, initial="random")])
    fine_tuning_of(kept).results([replace(short, initial="random")])  # from random weights: shared by all checkpoints
    assert len(list(tmp_path.iterdir())) == len(changed) + 1
