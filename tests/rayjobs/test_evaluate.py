"""evaluate.py without a cluster: several checkpoints, what is kept, what is reused, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import TASKS, Artifact
from image_data.prepare import DataConfig
from rayjobs import evaluate, evaluate_run
from rayjobs.checkpoint import save_checkpoint
from rayjobs.configs import TrainConfig, preset
from rayjobs.evaluate_config import EvaluateConfig, prepare_evaluation
from rayjobs.record import run_record
from rayjobs.result_files import copy_files, read_samples, write_files
from rayjobs.split_reader import SplitReader
from rayjobs.task_options import FROZEN_SUITE, TaskOptions, chosen_tasks
from tests.rayjobs.conftest import TinyBackbone

TRAIN = TrainConfig(image_size=16, epochs=1, batch_size=32)


@pytest.fixture
def checkpoints(tmp_path, monkeypatch, tiny_backbone, data, data_config):
    """Two checkpoints of random backbones, as pretraining writes them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    for seed, name in enumerate(("moco", "label")):
        torch.manual_seed(seed)
        config = preset("moco_v2" if name == "moco" else "supervised", TRAIN, data_config)
        save_checkpoint(tmp_path / name, config, run_record(config, data), TinyBackbone())
    return ["moco", "label"]


QUICK = ["--tasks", "knn", "few_shot", "--few-shot.num-tasks", "20", "--few-shot.num-queries", "5", "--experiment", ""]


def test_two_checkpoints_are_evaluated_and_compared(checkpoints, capsys):
    evaluate.main(["--checkpoint", *checkpoints, *QUICK, "--output", "out"])
    stored = json.loads(Path("out/evaluation.json").read_text())
    assert set(stored["models"]) == {"moco", "label"}
    assert stored["models"]["moco"]["info"] == {"method": "moco_v2", "num_classes": 8, "labels_used": False, "seed": 0}
    samples = [read_samples(f"out/{name}")["few_shot/5way_1shot_acc"] for name in checkpoints]
    assert [values.shape for values in samples] == [(20,), (20,)]
    means = [stored["models"][name]["metrics"]["few_shot/5way_1shot_acc"]["value"] for name in checkpoints]
    np.testing.assert_allclose(means, [values.mean() for values in samples])
    paired = {name: value for name, value in stored["comparison"].items() if "1shot" in name and value["ci95"]}
    assert any(abs(abs(value["value"]) - abs(means[0] - means[1])) < 1e-9 for value in paired.values())
    shown = capsys.readouterr().out
    assert "few_shot/5way_1shot_acc" in shown
    assert "out/evaluation.json" in shown


def test_a_finished_evaluation_is_not_repeated_and_an_interrupted_one_goes_on(checkpoints, capsys, monkeypatch):
    real, calls = evaluate_run.evaluate_backbone, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate_run, "evaluate_backbone", interrupted)
    arguments = ["--checkpoint", *checkpoints, *QUICK, "--output", "out"]
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 130
    assert "the same command goes on" in " ".join(capsys.readouterr().out.split())
    before = Path("out/moco/result.json").read_text()
    evaluate.main(arguments)
    assert len(calls) == 3  # the second checkpoint only
    assert Path("out/moco/result.json").read_text() == before
    assert "evaluated before" in capsys.readouterr().out
    evaluate.main([*arguments, "--seed", "1"])
    assert len(calls) == 5  # another seed gives other numbers


def test_metrics_known_before_an_interruption_are_on_disk(checkpoints, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    spec = TASKS["few_shot"]
    monkeypatch.setitem(TASKS, "few_shot", type(spec)(**{**vars(spec), "evaluate": interrupted}))
    with pytest.raises(SystemExit):
        evaluate.main(["--checkpoint", "moco", *QUICK, "--output", "out"])
    assert "knn/top1" in json.loads(Path("out/moco/partial.json").read_text())["metrics"]


def test_models_on_other_images_are_not_paired(checkpoints, tmp_path, data, data_config, capsys):
    config = preset("supervised", TRAIN, data_config)
    other = DataConfig(data=data_config.data, class_split=(0.3, 0.3, 0.4), cache=data_config.cache)
    save_checkpoint(
        tmp_path / "other", type(config)(**{**vars(config), "data": other}), run_record(config, data), TinyBackbone()
    )
    evaluate.main(["--checkpoint", "moco", "other", *QUICK, "--output", "out"])
    assert "Not compared, few_shot" in capsys.readouterr().out
    assert not any(
        name.startswith("few_shot") for name in json.loads(Path("out/evaluation.json").read_text())["comparison"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--checkpoint", "moco", "moco"], "holds something twice"),
        (["--checkpoint", "moco", "--names", "a", "b"], "2 names for 1 checkpoints"),
        (["--checkpoint", "moco", "--names", "a/b"], "cannot be the name of a folder"),
        (["--checkpoint", "moco", "--tasks", "knn", "--few-shot.num-ways", "3"], "Options of few_shot were given"),
        (["--checkpoint", "moco", "--tasks", "domains"], "--domains names the data sets"),
        (["--checkpoint", "moco", "--tasks", "knn", "--domains", "a=folder:x"], "--domains names the data sets"),
        (["--checkpoint", "moco", "--tasks", "few_shot", "--few-shot.num-ways", "99"], "needs at least 99 classes"),
    ],
)
def test_wrong_use_is_refused_before_any_pass(checkpoints, capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(arguments)
    assert stopped.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_names_are_the_shortest_ends_that_differ(checkpoints, tmp_path):
    for run in ("a", "b"):
        save = tmp_path / run / "moco"
        save.parent.mkdir()
        (tmp_path / "moco").joinpath("config.json").stat()
        save.symlink_to(tmp_path / "moco")
    setup = prepare_evaluation(EvaluateConfig(checkpoint=("a/moco", "b/moco/")), lambda _: None)
    assert [model.name for model in setup.models] == ["a-moco", "b-moco"]


def test_frozen_stands_for_the_suite():
    options = TaskOptions()
    assert next(iter(chosen_tasks(("knn", "frozen"), options))) == "knn"
    assert set(chosen_tasks(("frozen",), options)) == set(FROZEN_SUITE)


def test_files_come_back_as_they_were(tmp_path):
    samples = {"few_shot/a": np.arange(6.0).reshape(2, 3), "cam/maps": np.zeros((2, 4, 4), np.uint8)}
    write_files(tmp_path / "x", [Artifact("cam/grid.png", b"png")], samples)
    found = read_samples(tmp_path / "x")
    assert found.keys() == samples.keys()
    assert all(
        np.array_equal(found[name], values) and found[name].dtype == values.dtype for name, values in samples.items()
    )
    assert {path.name for path in copy_files(str(tmp_path / "x"), tmp_path / "y")} == {"grid.png", "samples.npz"}
    assert (tmp_path / "y/cam/grid.png").read_bytes() == b"png"
    assert read_samples(tmp_path / "nothing") == {}


def test_reader_gives_the_rows_that_were_asked_for(data):
    reader = SplitReader(data, TRAIN, "val")
    everything = np.concatenate([batch.views[0] for batch in reader.batches("val")])
    np.testing.assert_array_equal(reader.images("val", [5, 0, 5]), everything[[5, 0, 5]])
    assert reader.images("val", [1], image_size=24).shape == (1, 3, 24, 24)
    with pytest.raises(ValueError, match="rows 0 to 9999 of split 'val'"):
        reader.images("val", [0, 9999])
    for read in (lambda: reader.images("test", [0]), lambda: next(reader.views("novel_classes", "light"))):
        with pytest.raises(ValueError, match="phase 'val'"):
            read()


def test_views_differ_by_epoch_and_come_by_index(data):
    reader = SplitReader(data, TRAIN, "val", seed=3)

    def passed(epoch, shuffle):
        found = list(reader.views("val", "light", epoch=epoch, shuffle=shuffle, batch_size=10))
        return np.concatenate([b.index for b in found]), np.concatenate([b.views[0] for b in found])

    index, first = passed(0, False)
    np.testing.assert_array_equal(index, np.arange(len(index)))
    np.testing.assert_array_equal(passed(0, False)[1], first)
    assert not np.array_equal(passed(1, False)[1], first)
    order, shuffled = passed(0, True)
    assert sorted(order) == list(index)
    np.testing.assert_array_equal(shuffled[np.argsort(order)], first)
