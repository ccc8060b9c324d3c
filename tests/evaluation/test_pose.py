"""Pose is the classifier's problem with the column ``pose``, and without mirrored images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import pose
from evaluation.fine_tuning import Run, scored_table
from evaluation.fine_tuning.loop import draws
from evaluation.metric import Metric, Samples
from evaluation.pose import PoseConfig
from image_data.contracts import DataError
from tests.evaluation.fine_tuning.samples import (
    check_gradients,
    fine_tuning_context,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
    tiny_backbone,
)

# Viewpoints vary here; in the default data every image has the same pose.
URI = "rendered:?image_size=32&instances=2,1,1&held_out_instances=1&images_per_instance=1&classes=20&factors=0010"
CONFIG = PoseConfig(iterations=3, batch_size=4, learning_rate=0.01)


def _run() -> Run:
    return Run("seed0", "pose", pose.problem(CONFIG), "val")


def test_it_predicts_the_column_pose_among_five() -> None:
    data = rendered_data(URI)
    last = run_once(_run(), data).last
    poses = scored_table(data, "val").column("pose")
    assert len(set(poses)) > 1
    assert last["truth"].tolist() == poses
    assert set(last["predicted"].tolist()) <= set(range(5))
    trainee = _run().problem.build(tiny_backbone(), data, "val", 0, torch.device("cpu"))
    assert trainee.model.head.out_features == 5


@pytest.mark.parametrize("recipe", ["rendered", "newell_deng"])
def test_no_recipe_mirrors(recipe: str) -> None:
    config = replace(CONFIG, recipe=recipe)
    assert not pose.problem(config).augmentation.flip
    assert not pose.protocol(config, "test")["augmentation"]["flip"]
    assert "mirror" in pose.protocol(config, "test")["augmentation_note"]


def test_evaluation_yields_its_metric_and_images() -> None:
    metric, correct = list(pose.evaluate(CONFIG, fine_tuning_context("test", rendered_data(URI))))
    assert isinstance(metric, Metric)
    assert isinstance(correct, Samples)
    assert metric.name in pose.metric_names(CONFIG)
    assert metric.name == correct.name == "pose/top1"
    assert correct.values.mean() == pytest.approx(metric.value)


def test_images_of_one_pose_are_refused() -> None:
    with pytest.raises(DataError, match=r"all 36 images of train and val have the same pose.*factors=0110"):
        pose.check_data(CONFIG, "test", rendered_data(URI.replace("0010", "0100")))


def test_few_labels_are_even_over_poses() -> None:
    problem = pose.problem(replace(CONFIG, num_labels=4))
    trainee = problem.build(tiny_backbone(), rendered_data(URI), "val", 0, torch.device("cpu"))
    counts = np.bincount(trainee.load(draws(0, 4, 0, 4))[1])
    assert counts.sum() == 4
    assert counts.max() <= 2


def test_two_processes_equal_one_and_resuming_changes_nothing(tmp_path: Path) -> None:
    data = rendered_data(URI)
    one = run_once(_run(), data)
    two, again = run_in_two_processes(_run(), tmp_path, data), resumed(_run(), tmp_path / "run", 1, data)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=2e-4)
    np.testing.assert_array_equal(two.last["predicted"], one.last["predicted"])
    np.testing.assert_array_equal(again.losses, one.losses)
    np.testing.assert_array_equal(again.last["predicted"], one.last["predicted"])


def test_data_without_poses_and_too_many_labels_are_named(tmp_path: Path) -> None:
    from PIL import Image

    from image_data.prepare import DataConfig, prepare

    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(tmp_path / "images" / name / f"{i}.png")
    config = DataConfig(data=(f"folder:{tmp_path / 'images'}",), cache=str(tmp_path / "cache"), class_split=None)
    bare = prepare(config, log=lambda _: None)
    with pytest.raises(DataError, match=r"pose needs a target 'pose', but the images of split 'train' have no targets"):
        pose.check_data(CONFIG, "val", bare)
    pose.check_data(CONFIG, "val", rendered_data(URI))
    with pytest.raises(ValueError, match=r"pose got num_labels=25, but there are 24 training images"):
        pose.check(replace(CONFIG, num_labels=25), "val", {"train": (2,) * 12, "val": (1,) * 12})
