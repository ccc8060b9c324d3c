"""What a worker trains: it learns, two processes equal one, it resumes; its loss and its predictions."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.fine_tuning import Freezing, Schedule, train_table
from evaluation.fine_tuning.loop import draws
from evaluation.segmentation import problem as problem_module
from evaluation.segmentation import task
from evaluation.segmentation.metric import IGNORED, score
from evaluation.segmentation.problem import RECIPES, SegmentationProblem, example_rows
from methods.backbones import ResNet9
from tests.evaluation.fine_tuning.samples import (
    check_gradients,
    rendered_data,
    resumed,
    run_in_two_processes,
    run_once,
    tiny_backbone,
)
from tests.evaluation.segmentation.samples import NARROW, RUN, TINY, V3, streets, trainee_of

# --- training


def test_it_learns_the_parts_of_a_street() -> None:
    problem = SegmentationProblem(NARROW, Schedule(20, 8, 0.01, optimizer="adam", decay="poly"))
    result = run_once(replace(RUN, problem=problem, phase="test"), streets()[0])
    assert result.losses[-5:, 1].mean() < 0.6 * result.losses[0, 1]
    confusion = result.last["confusion"].sum(0)
    most_frequent = np.zeros_like(confusion)
    most_frequent[:, confusion.sum(1).argmax()] = confusion.sum(1)
    found, chance = score(confusion), score(most_frequent)
    assert found.miou > 3 * chance.miou
    assert found.aacc > 2 * chance.aacc
    assert abs(task.main_value(result.last) - found.aacc) < 10


@pytest.mark.parametrize("recipe", [NARROW, V3])
def test_two_processes_equal_one(recipe: Any, tmp_path: Path) -> None:
    run = replace(RUN, problem=replace(TINY, recipe=recipe))
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=1e-4)
    assert one.last["confusion"].shape == (12, 11, 11)
    # A pixel between two classes may fall to either side.
    assert np.abs(two.last["confusion"] - one.last["confusion"]).sum() <= 0.01 * one.last["confusion"].sum()
    assert np.abs(two.last["output_pixels"] - one.last["output_pixels"]).sum() <= 12
    assert (two.last["examples"] != one.last["examples"]).mean() < 0.01


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    problem = replace(TINY, recipe=RECIPES["rendered"], schedule=Schedule(6, 4, 0.02), evaluate_at=(2,), num_labels=9)
    run = replace(RUN, problem=problem)
    one, again = run_once(run), resumed(run, tmp_path, stop_at=3)
    np.testing.assert_array_equal(again.losses, one.losses)
    for at in (2, 6):
        for name in ("confusion", "output_pixels", "examples"):
            np.testing.assert_array_equal(again.predictions[at][name], one.predictions[at][name])


def test_the_loss_is_the_mean_over_labelled_pixels_of_the_batch() -> None:
    trainee = trainee_of(replace(TINY, recipe=V3))
    batch = trainee.load(draws(0, trainee.num_images, 0, 4))
    batch["masks"][0, :30] = IGNORED
    trainee.model.train()
    losses = trainee.model(batch)
    logits, auxiliary = trainee.model.deeplab(batch["images"])
    for name, own, weight in (("segmentation", logits, 1.0), ("auxiliary", auxiliary, 0.4)):
        full = torch.nn.functional.interpolate(own, size=batch["masks"].shape[1:], mode="bilinear")
        logs = full.log_softmax(1)
        valid = batch["masks"] != IGNORED
        picked = logs.gather(1, batch["masks"].long().clamp(max=10)[:, None])[:, 0][valid]
        torch.testing.assert_close(losses[name], -weight * picked.mean())


def test_a_batch_without_labels_has_loss_zero() -> None:
    trainee = trainee_of()
    batch = trainee.load(draws(0, trainee.num_images, 0, 2))
    batch["masks"].fill_(IGNORED)
    loss = torch.stack(list(trainee.model.train()(batch).values())).sum()
    loss.backward()
    assert loss.item() == 0


def test_label_subsets_and_frozen_stages() -> None:
    trainee = trainee_of(replace(TINY, num_labels=7), seed=3)
    assert trainee.num_images == 7
    assert len(np.unique(np.array(trainee._table.column("coarse"))[trainee._rows])) == 7  # none twice
    names = [str(trainee._table.value(int(row), "name")) for row in trainee._rows]
    read = []
    trainee._table.value, value = lambda row, column: read.append(row) or value(row, column), trainee._table.value
    trainee.load(draws(0, trainee.num_images, 0, 7))
    assert sorted({str(value(row, "name")) for row in read}) == sorted(names)
    other = trainee_of(replace(TINY, num_labels=7), seed=4)
    assert trainee._rows.tolist() != other._rows.tolist()
    backbone = tiny_backbone()
    Freezing(4).apply(backbone)
    frozen = TINY.build(backbone, rendered_data(), "val", 0, torch.device("cpu"))
    assert len(frozen.parameter_groups()) == 1
    assert len(trainee.parameter_groups()[0]["params"]) == len(list(tiny_backbone().parameters()))


def test_the_backbone_of_v3plus_learns_at_a_tenth() -> None:
    recipe = replace(RECIPES["deeplab_v3plus"], width=8)
    trainee = trainee_of(replace(TINY, recipe=recipe))
    assert [group.get("lr_scale", 1.0) for group in trainee.parameter_groups()] == [0.1, 1.0]
    norms = [m for m in trainee.model.deeplab.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {m.momentum for m in norms} == {0.01}
    assert trainee_of(TINY).model.deeplab.backbone.bn1.momentum == 0.1


# --- predictions


class _Oracle(torch.nn.Module):
    """Logits at a quarter of the resolution: what the red channel says, a class per 20 of 255."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        red = (images[:, 0, ::4, ::4] * 0.229 + 0.485) * 255
        classes = (red / 20).round().long()
        return 9.0 * torch.nn.functional.one_hot(classes, 11).permute(0, 3, 1, 2).float(), None


class _Masked:
    """Images in memory whose red is 20 times the class in the mask, but for the wrong pixels."""

    def __init__(self, masks: list[np.ndarray], wrong: list[np.ndarray]) -> None:
        self.num_images, self._masks, self._wrong = len(masks), masks, wrong

    def image(self, row: int) -> np.ndarray:
        return np.repeat(20 * self._wrong[row][:, :, None], 3, axis=2).astype(np.uint8)

    def value(self, row: int, column: str) -> Any:
        if column == "mask":
            buffer = io.BytesIO()
            Image.fromarray(self._masks[row]).save(buffer, "PNG")
            return buffer.getvalue()
        return {"name": f"image{row}", "height": len(self._masks[row]), "width": self._masks[row].shape[1]}[column]


@pytest.mark.parametrize("batch_pixels", [1, 1 << 18])
def test_planted_predictions_are_counted(batch_pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problem_module, "BATCH_PIXELS", batch_pixels)
    masks = [np.full((16, 24), c, np.uint8) for c in (0, 3, 3, 7)]
    masks[2] = np.full((20, 16), 3, np.uint8)  # another size
    masks[3][:, :12] = IGNORED
    shown = [mask.copy() for mask in masks]
    shown[1][:] = 5
    shown[3][:, :12] = 0
    trainee = trainee_of()
    trainee._scored, trainee.num_scored = _Masked(masks, shown), 4
    trainee.model.deeplab = _Oracle()
    found = trainee.predict([0, 1, 2, 3])
    expected = np.zeros((4, 11, 11), np.int64)
    expected[0, 0, 0], expected[1, 3, 5], expected[2, 3, 3] = 16 * 24, 16 * 24, 20 * 16
    expected[3, 7, 7] = 16 * 12
    # The upsampled logits of the ignored half reach into the labelled one where they are stronger: nowhere.
    np.testing.assert_array_equal(found["confusion"], expected)
    assert found["output_pixels"].tolist() == [[24, 24], [0, 24], [20, 20], [12, 12]]
    assert task.main_value(found) == pytest.approx(100 * 56 / 80)
    assert found["examples"].shape == (4, 16, 24)
    assert (found["examples"][1] == 5).all()


def test_images_are_scored_at_the_given_size_and_counted_at_their_own() -> None:
    trainee = trainee_of(replace(TINY, image_size=16))
    seen = []
    trainee.model.deeplab.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    with torch.no_grad():
        found = trainee.predict([0, 1])
    assert seen == [(2, 3, 16, 16)]
    assert (found["confusion"].sum((1, 2)) == 32 * 32).all()
    assert trainee._view.size == (16, 16)


def test_example_rows_are_spread_and_distinct() -> None:
    assert example_rows(100).tolist() == [0, 20, 40, 59, 79, 99]
    assert example_rows(3).tolist() == [0, 1, 2]


def test_crops_of_cityscapes_shrink_with_the_images() -> None:
    data, _ = streets()
    height = train_table(data, "test").value(0, "height")
    trainee = SegmentationProblem(V3, TINY.schedule).build(
        ResNet9(stem="imagenet", width=8), data, "test", 0, torch.device("cpu")
    )
    batch = trainee.load(draws(0, trainee.num_images, 0, 2))
    assert batch["images"].shape == (2, 3, height // 2, height)
    assert batch["masks"].shape == (2, height // 2, height)
    large = problem_module._view(SegmentationProblem(RECIPES["deeplab_v3plus"], TINY.schedule, 1024), trainee._table)
    assert large.size == (768, 768)
