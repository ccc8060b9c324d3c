"""Fine-tuning tasks in the commands, without a cluster: own images, default suite, objectives, what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import rayjobs.fine_tuning_runs
from evaluation.pose import PoseConfig
from image_data.prepare import DataConfig, prepare
from rayjobs import evaluate
from rayjobs.checkpoint import save_checkpoint
from rayjobs.configs import TrainConfig, preset
from rayjobs.evaluate_config import EvaluateConfig, prepare_evaluation
from rayjobs.record import run_record
from rayjobs.sweep_config import SweepConfig, prepare_sweep
from rayjobs.task_options import DOWNSTREAM_SUITE, TaskOptions
from tests.evaluation.fine_tuning.samples import URI
from tests.image_data.annotated_samples import write_voc
from tests.rayjobs.conftest import TinyBackbone

TRAIN = TrainConfig(image_size=16, epochs=1, batch_size=8)
QUICK = TaskOptions(pose=PoseConfig(iterations=2, batch_size=4))
FLAGS = ["--pose.iterations", "2", "--pose.batch-size", "4", "--experiment", ""]


@pytest.fixture(scope="module")
def rendered(tmp_path_factory):
    config = DataConfig((URI,), cache=str(tmp_path_factory.mktemp("cache")))
    return config, prepare(config, log=lambda _: None)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch, tiny_backbone, rendered):
    """A checkpoint of a random backbone whose own images are rendered ones."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rayjobs.fine_tuning_runs, "build_backbone", lambda *_, **__: TinyBackbone())
    torch.manual_seed(0)
    config = preset("supervised", TRAIN, rendered[0])
    save_checkpoint(tmp_path / "model", config, run_record(config, rendered[1]), TinyBackbone())
    return "model"


def _setup(**fields):
    return prepare_evaluation(EvaluateConfig(checkpoint=("model",), **fields), lambda _: None)


def test_without_tasks_all_that_the_data_have_targets_for_are_measured(checkpoint, image_folder):
    uri = "rendered:?image_size=32&instances=1,1,1&held_out_instances=20&images_per_instance=1&classes=25"
    setup = _setup(data=DataConfig((f"{uri}&factors=1010",)))
    assert {"linear", "few_shot", "pose", "segmentation", "landmarks", "classification"} <= set(setup.tasks)
    assert set(setup.left_out) <= {"detection"}  # where detectron2 is missing
    assert not setup.task_data
    setup = _setup(data=DataConfig((f"{uri}&factors=1000",)))
    assert setup.task_data["pose"].prepared.source == (f"train={uri}&factors=1010",)
    setup = _setup(data=DataConfig((f"{uri}&factors=1000",)), num_workers=3)
    assert "does not divide over 3 workers" in setup.left_out["pose"]
    assert "utility" in setup.tasks  # its runs are one process each
    plain = DataConfig((f"folder:{image_folder}",), class_split=(0.4, 0.3, 0.3))
    setup = _setup(data=plain)
    assert set(setup.left_out) == set(DOWNSTREAM_SUITE) - {"classification", "utility"}
    assert "pose" in setup.left_out["pose"]


def test_images_of_a_task_of_its_own(checkpoint, tmp_path):
    write_voc(tmp_path / "VOCdevkit")
    setup = _setup(tasks=("classification", "knn"), task_data=(f"classification=voc:{tmp_path}/VOCdevkit",))
    assert set(setup.task_data) == {"classification"}
    assert setup.task_data["classification"].prepared.source == (f"train=voc:{tmp_path}/VOCdevkit",)
    assert setup.models[0].data.source == (URI,)
    assert setup.models[0].key != _setup(tasks=("classification", "knn")).models[0].key


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"task_data": ("pose",), "tasks": ("pose",)}, "write TASK=URI"),
        ({"task_data": ("knn=rendered:",), "tasks": ("knn",)}, "'knn' is not among the chosen tasks that take images"),
        ({"task_data": ("pose=rendered:",), "tasks": ("knn",)}, "add it to --tasks"),
        ({"task_data": ("pose=voc:nowhere",), "tasks": ("pose",)}, "does not exist"),
        ({"tasks": ("knn",), "options": QUICK}, "Options of pose were given"),
        ({"tasks": ("utility", "pose"), "num_workers": 3}, "pose: a batch of 32 images does not divide over 3 workers"),
    ],
)
def test_wrong_use_is_refused_before_training(checkpoint, fields, words):
    with pytest.raises(ValueError, match=words):
        _setup(**fields)


def test_data_without_the_targets_are_refused_with_the_column(checkpoint, image_folder):
    plain = DataConfig((f"folder:{image_folder}",), class_split=(0.4, 0.3, 0.3))
    with pytest.raises(ValueError, match="landmarks"):
        _setup(tasks=("landmarks",), data=plain)


def test_an_evaluation_trains_keeps_its_runs_and_does_not_repeat_them(checkpoint, capsys, monkeypatch):
    arguments = ["--checkpoint", "model", "--tasks", "pose", *FLAGS, "--output", "out"]
    evaluate.main(arguments)
    stored = json.loads(Path("out/model/result.json").read_text())
    assert 0 <= stored["metrics"]["pose/top1"]["value"] <= 100
    assert stored["protocol"]["pose"]["split"] == "test"
    assert len(list(Path("out/runs").glob("pose-*/result.npz"))) == 1
    Path("out/model/result.json").unlink()
    monkeypatch.setattr(rayjobs.fine_tuning_runs, "run_here", lambda *_: pytest.fail("it was trained again"))
    evaluate.main(arguments)
    assert json.loads(Path("out/model/result.json").read_text())["metrics"] == stored["metrics"]
    assert "pose/top1" in capsys.readouterr().out


def test_an_error_as_objective_is_minimised(rendered):
    config = SweepConfig(train=TRAIN, data=rendered[0], tasks=("knn",), objective="landmarks/error")
    setup = prepare_sweep(replace(config, methods=("supervised",)), rendered[1])
    assert setup.direction == "minimize"
    assert list(setup.tasks) == ["landmarks", "knn"]
    assert setup.probe_metric == "knn/top1"
    chosen = replace(config, methods=("supervised",), objective="pose/top1", options=QUICK)
    setup = prepare_sweep(chosen, rendered[1])
    assert (setup.direction, setup.tasks["pose"].iterations) == ("maximize", 2)
