"""Label efficiency as a task, on tiny rendered images."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evaluation import Artifact, Metric, Samples
from evaluation.fine_tuning import FineTuneResult, FineTuning
from evaluation.utility import UtilityConfig, check, check_data, evaluate, label_ladder, protocol
from evaluation.utility_curve import labels_worth
from tests.evaluation.fine_tuning.samples import fine_tuning_context, rendered_data, tiny_backbone

QUICK = UtilityConfig(labels=(6, 12), iterations=2, batch_size=4)
COUNTS: Any = {name: info.class_counts for name, info in rendered_data().splits.items()}


def _planted(accuracies: dict[str, float]) -> FineTuning:
    """Runs whose accuracy is known by their name's beginning."""

    def run(runs: Any, spread: bool = False) -> Any:
        assert spread
        for i in reversed(range(len(runs))):
            correct = np.arange(100) < accuracies["-".join(runs[i].name.split("-")[:2])]
            yield i, FineTuneResult({2: {"predicted": correct.astype(np.int64), "truth": np.ones(100, np.int64)}})

    return FineTuning(lambda _: rendered_data(), run, tiny_backbone)


def test_planted_accuracies_give_their_utility() -> None:
    known = {"n6-scratch": 20, "n12-scratch": 40, "n6-finetuned": 30, "n12-finetuned": 50}
    context = replace(fine_tuning_context(), fine_tuning=_planted(known))
    outputs = list(evaluate(QUICK, context))
    metrics = {output.name: output for output in outputs if isinstance(output, Metric)}
    assert metrics["utility/scratch_n12"].value == 40
    assert metrics["utility/finetuned_n6"].value == 30
    assert metrics["utility/u_n6"].value == pytest.approx(9 / 6 - 1)
    assert metrics["utility/u_n12"].value == 0.0  # above every scratch mean: at least 0
    assert metrics["utility/u_n12"].ci95 is None
    assert metrics["utility/mean_gain"].value == pytest.approx(10)
    assert metrics["utility/mean_log2"].value == pytest.approx((np.log2(1.5) + 0) / 2)
    record = json.loads(next(o.data for o in outputs if isinstance(o, Artifact) and o.name.endswith(".json")))
    assert [point["status"] for point in record["points"]] == ["ok", "above_range"]
    assert next(o for o in outputs if isinstance(o, Samples)).values.shape == (2,)


@pytest.mark.parametrize(("finetuned", "censored"), [((30, 40), 0), ((30, 41), 50), ((19, 41), 100)])
def test_runs_outside_the_scratch_curve_are_counted(finetuned: tuple[int, int], censored: float) -> None:
    known = {"n6-scratch": 20, "n12-scratch": 40, "n6-finetuned": finetuned[0], "n12-finetuned": finetuned[1]}
    outputs = evaluate(QUICK, replace(fine_tuning_context(), fine_tuning=_planted(known)))
    assert next(output.value for output in outputs if output.name == "utility/censored") == censored


@pytest.mark.parametrize("target", ["classification", "pose", "segmentation", "depth"])
def test_every_target_trains_the_whole_grid(target: Any) -> None:
    config = replace(QUICK, target=target, seeds=1)
    metrics = {o.name: o.value for o in evaluate(config, fine_tuning_context("val")) if isinstance(o, Metric)}
    counts = np.array([6, 12])
    scratch = np.array([metrics[f"utility/scratch_n{n}"] for n in counts])
    for n in counts:
        worth = labels_worth(metrics[f"utility/finetuned_n{n}"], n, counts, scratch)
        assert metrics[f"utility/u_n{n}"] == pytest.approx(worth.n_hat / n - 1)


def test_scratch_and_fine_tuned_runs_differ_only_in_their_start() -> None:
    seen: list[Any] = []

    def run(runs: Any, spread: bool = False) -> Any:
        seen.extend(runs)
        yield from ()

    context = replace(fine_tuning_context(), fine_tuning=FineTuning(lambda _: rendered_data(), run, tiny_backbone))
    with pytest.raises(AssertionError, match="gave no result"):
        list(evaluate(QUICK, context))
    assert len(seen) == 8
    for run in seen:
        swapped = {"scratch": "finetuned", "finetuned": "scratch"}
        n, start, seed = run.name.split("-")
        twin = next(other for other in seen if other.name == f"{n}-{swapped[start]}-{seed}")
        assert (twin.seed, twin.problem, twin.phase) == (run.seed, run.problem, run.phase)
        assert {run.initial, twin.initial} == {"checkpoint", "random"}
        assert (run.initial == "random") == (start == "scratch")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": (12, 6)}, "ascending"),
        ({"labels": (12,)}, "at least two"),
        ({"labels": (6, 1000)}, "up to 1,000 labels, but there are 36"),
        ({"target": "boxes"}, "target='boxes'"),
        ({"seeds": 0}, "seeds=0"),
        ({"recipe": "newell_deng", "labels": ()}, "up to 200,000 labels"),
        ({"target": "segmentation", "recipe": "newell_deng"}, "rendered only"),
    ],
)
def test_impossible_options(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(replace(QUICK, **changes), "test", COUNTS)


def test_the_ladder_fits_the_data() -> None:
    assert label_ladder(UtilityConfig(), 1600) == (100, 400, 1600)
    assert label_ladder(UtilityConfig(), 40) == (16, 40)
    assert label_ladder(QUICK, 1600) == (6, 12)


def test_the_target_decides_which_column_is_needed(tmp_path: Any) -> None:
    check_data(replace(QUICK, target="pose"), "val", rendered_data())
    assert protocol(replace(QUICK, target="pose"), "val")["target"]["name"]
