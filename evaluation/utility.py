"""Label efficiency: how many labels pretraining is worth on a task (Newell & Deng, CVPR 2020).

For every label count n the same network is trained from scratch and fine-tuned from the checkpoint, with several seeds,
on the same n labelled images (even over classes, nested over n, drawn by the seed). ``utility_curve.py`` has n_hat and
U(n), and what they do at the ends of the curve. Runs from scratch do not depend on the checkpoint, so several
checkpoints that are evaluated together share them.

``utility/mean_log2``, which a sweep can maximise, is ours: the mean over label counts of log2(n_hat / n), the doublings
of labels that pretraining saves; a run outside the range of the scratch curve counts with its bound. So harm at the
smallest label count, where fewer labels cannot be told apart, shows in ``utility/mean_gain`` only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from evaluation import classification, depth, pose
from evaluation.fine_tuning import Initial, Run, task_splits, train_splits
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    Output,
    Phase,
    Samples,
    check_image_splits,
)
from evaluation.segmentation import task as segmentation
from evaluation.utility_curve import Interpolation, UtilityPoint, utility_points
from image_data.prepared import PreparedData

__all__ = ["UtilityConfig", "check", "check_data", "evaluate", "label_ladder", "metric_names", "protocol", "splits"]

Target = Literal["classification", "pose", "segmentation", "depth"]

NEWELL_DENG_LABELS = (100, 250, 1000, 4000, 20_000, 50_000, 100_000, 200_000)  # selfstudy: config/grid_search.py
LADDER_STEP, LADDER_STEPS, FEWEST = 4, 3, 16  # of the counts that are chosen by the data
RENDERED_ITERATIONS = 60  # of a run: the grid has a dozen of them
INITIALS: tuple[Initial, ...] = ("random", "checkpoint")

_TARGETS: dict[str, tuple[Any, type]] = {
    "classification": (classification, classification.ClassificationConfig),
    "pose": (pose, pose.PoseConfig),
    "segmentation": (segmentation, segmentation.SegmentationConfig),
    "depth": (depth, depth.DepthConfig),
}


@dataclass(frozen=True)
class UtilityConfig:
    """How many labels pretraining saves.

    Attributes:
        target: the task whose labels are counted: classification, pose, segmentation or depth.
        recipe: settings of the target's training: rendered (small), or newell_deng (the paper's schedule for each label
            count, and its counts).
        labels: label counts, ascending; empty takes newell_deng's for that recipe, else all training images, a quarter
            and a sixteenth of them.
        seeds: runs from scratch and runs from the checkpoint per label count.
        iterations: of every run; 0 is 60 for the recipe rendered, else newell_deng's for the number of labels.
        batch_size: images per step; 0 is the target recipe's.
        learning_rate: peak; 0 is the target recipe's.
        image_size: side in pixels; 0 leaves the images as they are stored.
        interpolation: of the scratch curve between two label counts: linear in n (as in the reference) or in log n.
        monotone: use the closest scratch curve that never falls instead of the plain means.
    """

    target: Target = "classification"
    recipe: Literal["rendered", "newell_deng"] = "rendered"
    labels: tuple[int, ...] = ()
    seeds: int = 2
    iterations: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    image_size: int = 0
    interpolation: Interpolation = "linear"
    monotone: bool = False


def label_ladder(config: UtilityConfig, num_images: int) -> tuple[int, ...]:
    """The label counts of a run, ascending.

    Args:
        config: the options.
        num_images: training images there are.
    """
    if config.labels:
        return config.labels
    if config.recipe == "newell_deng":
        return NEWELL_DENG_LABELS
    steps = (num_images // LADDER_STEP**i for i in reversed(range(LADDER_STEPS)))
    return tuple(sorted({max(min(FEWEST, num_images), n) for n in steps}))


def _target_config(config: UtilityConfig, n: int) -> Any:
    recipe: dict[str, Any] = {} if config.target == "segmentation" else {"recipe": config.recipe}
    return _TARGETS[config.target][1](
        **recipe,
        iterations=config.iterations or (RENDERED_ITERATIONS if config.recipe == "rendered" else 0),
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        image_size=config.image_size,
        num_labels=n,
    )


def metric_names(config: UtilityConfig) -> tuple[str, ...]:
    """Names of the main metrics."""
    return ("utility/mean_log2", "utility/mean_gain")


def splits(config: UtilityConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return task_splits(phase)


def protocol(config: UtilityConfig, phase: Phase) -> dict[str, Any]:
    """Everything needed to reproduce the numbers, as JSON data."""
    module = _TARGETS[config.target][0]
    target = module.protocol(_target_config(config, max(config.labels, default=0)), phase)
    return {
        "name": f"label efficiency of {config.target}",
        "source": "Newell & Deng, CVPR 2020; princeton-vl/selfstudy: util/vis.py, config/grid_search.py",
        "phase": phase,
        "split": phase,
        "labels": list(config.labels) or "from the data or the recipe; see utility.json",
        "labelled_images": "even over classes, nested over label counts, drawn by the run's seed; scratch and "
        "fine-tuned runs of a seed see the same",
        "target": target,
        "schedule": {
            str(n): _TARGETS[config.target][0].problem(_target_config(config, n)).schedule.to_json()
            for n in config.labels or (NEWELL_DENG_LABELS if config.recipe == "newell_deng" else (0,))
        },
        "metric": "mean_log2: mean over label counts of log2(n_hat / n) (ours; runs out of range count with their "
        "bound); mean_gain: mean accuracy difference in points; u_n<count>: n_hat / n - 1; censored: percentage of "
        "fine-tuned runs outside the range of the scratch curve, whose utility is a bound",
        "scratch_curve": "isotonic regression of the means" if config.monotone else "mean over runs per label count",
        "interpolation": f"{config.interpolation} between the first mean that reaches the accuracy and the one before",
        "reported": "last iteration",
        "interval": "Student's t over fine-tuned runs; none for bounds and for one run",
        "config": asdict(config),
    }


def check(config: UtilityConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation."""
    choices = {"target": get_args(Target), "interpolation": get_args(Interpolation)}
    for name, allowed in {**choices, "recipe": ("rendered", "newell_deng")}.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"utility got {name}={getattr(config, name)!r}; allowed: {', '.join(allowed)}.")
    if config.target == "segmentation" and config.recipe != "rendered":
        raise ValueError("utility of segmentation has the recipe rendered only; drop recipe=newell_deng.")
    if config.seeds < 1:
        raise ValueError(f"utility got seeds={config.seeds}; give at least 1 (2 for an interval).")
    check_image_splits("utility", class_counts, task_splits(phase))
    available = sum(sum(class_counts[split]) for split in train_splits(phase))
    counts = label_ladder(config, available)
    if len(counts) < 2 or min(counts) < 1 or list(counts) != sorted(set(counts)):
        raise ValueError(
            f"utility got labels={', '.join(map(str, counts))}; give at least two ascending label counts, 1 or more."
        )
    if counts[-1] > available:
        raise ValueError(
            f"utility needs up to {counts[-1]:,} labels, but there are {available:,} training images; give --utility."
            f"labels with counts up to {available:,}."
        )
    _TARGETS[config.target][0].check(_target_config(config, counts[0]), phase, class_counts)


def check_data(config: UtilityConfig, phase: Phase, data: PreparedData) -> None:
    """DataError where the images lack the target's column, or all have the same pose."""
    if config.target == "pose":
        pose.check_poses("utility", phase, data)
    else:
        _TARGETS[config.target][0].check_data(_target_config(config, 0), phase, data)


def evaluate(config: UtilityConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield accuracies of both starts per label count as they are known, then U(n) with its plot and record."""
    assert context.fine_tuning is not None
    data = context.fine_tuning.data("utility")
    check(config, context.phase, {name: info.class_counts for name, info in data.splits.items()})
    check_data(config, context.phase, data)
    counts = label_ladder(config, sum(data.split(split).num_images for split in train_splits(context.phase)))
    module = _TARGETS[config.target][0]
    runs, cells = _grid(config, context, counts)
    values = {initial: np.full((len(counts), config.seeds), np.nan) for initial in INITIALS}
    for position, result in context.fine_tuning.run(runs, spread=True):
        initial, row, column = cells[position]
        values[initial][row, column] = module.main_value(result.last)
        if not np.isnan(values[initial][row]).any():
            yield _accuracy(initial, counts[row], values[initial][row])
    scratch, finetuned = values["random"], values["checkpoint"]
    assert np.isfinite([scratch, finetuned]).all(), "a run of the grid gave no result or no accuracy"
    points = utility_points(np.array(counts), scratch, finetuned, config.interpolation, config.monotone)
    for point in points:
        yield Metric(f"utility/u_n{point.n}", point.utility, point.half_width, len(point.runs))
    doublings = [[math.log2(run.n_hat / point.n) for run in point.runs] for point in points]
    yield Metric("utility/mean_log2", float(np.mean(doublings)))
    yield Metric("utility/mean_gain", float((finetuned.mean(1) - scratch.mean(1)).mean()))
    outside = [run.status != "ok" for point in points for run in point.runs]
    yield Metric("utility/censored", 100.0 * float(np.mean(outside)))
    yield Samples("utility/mean_log2", np.mean(doublings, axis=1))
    yield Artifact("utility/utility.json", _record(config, scratch, finetuned, points))
    from evaluation.utility_figures import utility_plot

    yield Artifact("utility/curves.png", utility_plot(config.target, scratch, finetuned, points))


def _grid(
    config: UtilityConfig, context: EvaluationContext, counts: Sequence[int]
) -> tuple[list[Run], list[tuple[Initial, int, int]]]:
    """All runs, and for each which cell of the table it fills: start, label count, seed."""
    module = _TARGETS[config.target][0]
    runs, cells = [], []
    for row, n in enumerate(counts):
        problem = module.problem(_target_config(config, n))
        for initial in INITIALS:
            start = "scratch" if initial == "random" else "finetuned"
            for column in range(config.seeds):
                seed = context.seed + column
                runs.append(Run(f"n{n}-{start}-seed{seed}", "utility", problem, context.phase, seed, initial))
                cells.append((initial, row, column))
    return runs, cells


def _accuracy(initial: Initial, n: int, values: np.ndarray) -> Metric:
    name = f"utility/{'scratch' if initial == 'random' else 'finetuned'}_n{n}"
    if len(values) == 1:
        return Metric(name, float(values[0]))
    from evaluation.intervals import mean_and_half_width

    return Metric(name, *mean_and_half_width(values, "rfs"), len(values))


def _record(config: UtilityConfig, scratch: np.ndarray, finetuned: np.ndarray, points: Sequence[UtilityPoint]) -> bytes:
    """All values and statuses."""
    rows = [
        {
            "labels": point.n,
            "scratch": scratch[i].tolist(),
            "finetuned": finetuned[i].tolist(),
            "utility": point.utility,
            "half_width": point.half_width,
            "status": point.status,
            "runs": [
                {"n_hat": run.n_hat, "utility": run.n_hat / point.n - 1, "status": run.status} for run in point.runs
            ],
        }
        for i, point in enumerate(points)
    ]
    return json.dumps({"target": config.target, "points": rows}, indent=1).encode()
