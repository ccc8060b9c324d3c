"""The loop itself, on the smallest problem: regress the mean colour of an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.fine_tuning import Draw, Freezing, Run, Schedule, scored_table, train_table
from evaluation.fine_tuning.loop import FineTuningDiverged, draws
from evaluation.fine_tuning.normalize import share_of_mean
from tests.evaluation.fine_tuning.samples import check_gradients, resumed, run_in_two_processes, run_once, tiny_backbone


class _Model(nn.Module):
    def __init__(self, backbone: Any, bias: float) -> None:
        super().__init__()
        self.backbone, self.head, self.bias = backbone, nn.Linear(backbone.num_features, 3), bias

    def outputs(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.backbone(x)) + self.bias

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        squared = (self.outputs(batch["images"]) - batch["colors"]).square().mean(1)
        kept = batch["weights"] > 0.3  # another number of images on each worker
        return {"color": share_of_mean(squared[kept].sum(), kept.sum())}


class _Trainee:
    def __init__(self, backbone: Any, data: Any, phase: Any, bias: float) -> None:
        self.model = _Model(backbone, bias)
        self.table, self.scored = train_table(data, phase), scored_table(data, phase)
        self.num_images, self.num_scored = self.table.num_images, self.scored.num_images

    def load(self, draws: Sequence[Draw]) -> dict[str, torch.Tensor]:
        images = np.stack([self.table.image(draw.row) for draw in draws]).transpose(0, 3, 1, 2) / 255.0
        tensor = torch.from_numpy(images.astype(np.float32))
        noise = torch.tensor([draw.rng.random() for draw in draws], dtype=torch.float32)
        return {"images": tensor + 0.01 * noise[:, None, None, None], "colors": tensor.mean((2, 3)), "weights": noise}

    def parameter_groups(self) -> list[dict[str, Any]]:
        backbone = [p for p in self.model.backbone.parameters() if p.requires_grad]
        return [{"params": backbone}, {"params": list(self.model.head.parameters()), "lr_scale": 2.0}]

    def before_predict(self, batches: Iterator[Any]) -> None:
        next(batches)

    def predict(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        images = np.stack([self.scored.image(row) for row in rows]).transpose(0, 3, 1, 2) / 255.0
        return {
            "colors": self.model.outputs(torch.from_numpy(images.astype(np.float32))).numpy(),
            "rows": np.array(rows),
        }


@dataclass(frozen=True)
class _Problem:
    schedule: Schedule = Schedule(8, 4, 0.01, warmup_iterations=2, decay="cosine", clip_norm=5.0)  # noqa: RUF009
    evaluate_at: tuple[int, ...] = (3,)
    freezing: Freezing = Freezing()  # noqa: RUF009
    bias: float = 0.0

    def build(self, backbone: Any, data: Any, phase: Any, seed: int, device: Any) -> _Trainee:
        return _Trainee(backbone, data, phase, self.bias)


RUN = Run("seed0", "color", _Problem(), "val")


def test_it_learns_and_scores_every_image_in_order() -> None:
    result = run_once(replace(RUN, problem=_Problem(Schedule(40, 8, 0.05))))
    assert result.losses[-5:, 1].mean() < 0.5 * result.losses[0, 1]
    assert set(result.predictions) == {3, 40}
    assert result.last["rows"].tolist() == list(range(12))


def test_two_processes_equal_one(tmp_path: Path) -> None:
    # Few iterations: through max-pooling a rounding error of 1e-7 becomes one of 1e-3 within ten.
    run = replace(RUN, problem=_Problem(Schedule(3, 4, 0.01, clip_norm=5.0), evaluate_at=()))
    one, two = run_once(run), run_in_two_processes(run, tmp_path)
    check_gradients(one, two)
    np.testing.assert_allclose(two.losses, one.losses, rtol=2e-5)
    np.testing.assert_allclose(two.last["colors"], one.last["colors"], atol=2e-4)
    assert two.last["rows"].tolist() == one.last["rows"].tolist()


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    one, again = run_once(RUN), resumed(RUN, tmp_path, stop_at=4)
    np.testing.assert_array_equal(again.losses, one.losses)
    assert set(again.predictions) == {3, 8}
    for at in (3, 8):
        np.testing.assert_array_equal(again.predictions[at]["colors"], one.predictions[at]["colors"])


def test_divergence_is_named() -> None:
    with pytest.raises(FineTuningDiverged, match=r"color \(seed0\) became NaN or infinite at iteration 1 of 8"):
        run_once(replace(RUN, problem=_Problem(bias=float("nan"))))


def test_every_image_once_per_epoch_and_the_same_for_any_cut() -> None:
    order = [draw.row for draw in draws(3, 10, 0, 30)]
    assert all(sorted(order[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert order[:10] != order[10:20]
    assert [d.row for i in range(0, 30, 3) for d in draws(3, 10, i, i + 3)] == order
    assert draws(3, 10, 7, 8)[0].rng.random() == draws(3, 10, 5, 9)[2].rng.random()


@pytest.mark.parametrize(("mode", "moves"), [("train", True), ("eval", False)])
def test_frozen_stages_keep_their_weights_and_their_statistics_follow_the_mode(mode: Any, moves: bool) -> None:
    backbones: list[Any] = []

    def remembered(initial: str, seed: int) -> Any:
        backbones.append(tiny_backbone(initial, seed))
        return backbones[-1]

    run_once(replace(RUN, problem=_Problem(freezing=Freezing(2, mode))), backbone=remembered)
    before, after = tiny_backbone().state_dict(), backbones[0].state_dict()
    for name in ("conv1.weight", "layer1.0.conv1.weight", "bn1.weight"):
        assert torch.equal(before[name], after[name]), name
    assert not torch.equal(before["layer2.0.conv1.weight"], after["layer2.0.conv1.weight"])
    assert torch.equal(before["bn1.running_mean"], after["bn1.running_mean"]) != moves
    assert not torch.equal(before["layer2.0.bn.running_mean"], after["layer2.0.bn.running_mean"])


def test_more_frozen_stages_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"5 stages are to be frozen, but the backbone has 4"):
        run_once(replace(RUN, problem=_Problem(freezing=Freezing(5))))
