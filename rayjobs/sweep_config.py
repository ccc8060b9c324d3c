"""The sweep command's configuration, and the checks that run before any worker starts."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evaluation import TASKS
from image_data.prepare import DataConfig
from image_data.prepared import PreparedData
from methods import METHODS
from rayjobs.configs import PretrainConfig, TrainConfig, preset, with_parameters
from rayjobs.job import view_recipes
from rayjobs.task_data import TaskData, check_task_data, prepare_task_data
from rayjobs.task_options import TaskOptions, chosen_tasks
from rayjobs.train_loop import method_context
from rayjobs.transfer import TaskConfigs, task_of
from search_spaces import SearchSpace, SpaceContext, search_space

__all__ = ["SweepConfig", "SweepSetup", "checked_batch", "prepare_sweep", "sweep_defaults"]

PROBE_TASKS = 200  # few-shot tasks of the pruning metric; the objective itself uses the full protocol


@dataclass(frozen=True)
class SweepConfig:
    """Which pretraining transfers best: sweep methods and hyperparameters, judged by downstream transfer.

    Attributes:
        space: search space: transfer (all methods), or the name of one method.
        methods: only these methods of the space.
        num_trials: trials to run.
        objective: downstream metric to optimise; empty takes the space's. Measured on validation data.
        tasks: downstream tasks measured for every finished trial; empty takes the space's.
        task_data: images of single fine-tuning tasks, as TASK=URI (detection=voc:DIR).
        prune: stop trials that fall behind after a quarter of the epochs (at least 2), and at every doubling (ASHA;
            the first 3 trials at each of these epochs go on).
        confirm: retrain the winner with this many new seeds and report the test split.
        name: name of the sweep: folder under --output and MLflow experiment; empty makes one from the time.
        output: folder (or URI that all nodes reach) of results and checkpoints.
        resume: continue an interrupted sweep: finished trials stay, others go on from their checkpoint.
        options: options of the downstream tasks.
        train: training settings of all trials.
        data: images, splits, subsets.
    """

    space: str = "transfer"
    methods: tuple[str, ...] = ()
    num_trials: int = 18
    objective: str = ""
    tasks: tuple[str, ...] = ()
    task_data: tuple[str, ...] = ()
    prune: bool = True
    confirm: int = 0
    name: str = ""
    output: str = "results"
    resume: bool = False
    options: TaskOptions = field(default_factory=TaskOptions)  # pyright: ignore[reportInvalidTypeForm] - made of TASKS
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True)
class SweepSetup:
    """A checked sweep: nothing in it can fail for a reason that the user could have been told before."""

    config: SweepConfig
    space: SearchSpace
    context: SpaceContext
    base: dict[str, PretrainConfig]
    tasks: TaskConfigs
    probe: TaskConfigs
    probe_metric: str
    objective: str
    left_out: dict[str, str]
    task_data: dict[str, TaskData] = field(default_factory=dict)

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """Which way the objective is better: an error is minimised, whatever the space's own objective is."""
        is_own = self.objective == self.space.objective
        is_error = TASKS[task_of(self.objective, self.config.options)].direction == "min"
        return self.space.direction if is_own or not is_error else "minimize"


def checked_batch(train: TrainConfig, data: PreparedData) -> None:
    """Raise ValueError when the global batch does not divide over workers and micro-steps or exceeds the data."""
    parts = train.num_workers * train.accumulate
    if train.num_workers < 1 or train.accumulate < 1 or train.batch_size < 1:
        raise ValueError("--num-workers, --accumulate and --batch-size must be at least 1.")
    if train.batch_size % parts:
        raise ValueError(
            f"--batch-size {train.batch_size} is not a multiple of workers x micro-steps = {train.num_workers} x "
            f"{train.accumulate}. Use {max(1, train.batch_size // parts) * parts}, or change --accumulate."
        )
    images = data.split("train").num_images
    if train.batch_size > images:
        raise ValueError(
            f"--batch-size {train.batch_size} exceeds the {images} images of the training split: no full batch exists. "
            f"Use at most {images // parts * parts}."
        )
    if train.epochs < 0:
        raise ValueError(f"--epochs is {train.epochs}; give 0 (random initialisation) or more.")


def prepare_sweep(config: SweepConfig, data: PreparedData) -> SweepSetup:
    """Check the whole sweep against the data.

    Raises:
        ValueError: what is wrong, what is allowed, how to fix it. A method that cannot run here is an error when the
            user named it; from a space of many it is left out, and ``left_out`` says why.
    """
    space = search_space(config.space)
    _check_numbers(config)
    checked_batch(config.train, data)
    methods = _selected(config, space)
    objective = config.objective or space.objective
    task_of(objective, config.options)  # an unknown metric, before its task is looked for
    tasks = chosen_tasks(_with_objective(config.tasks or space.tasks, objective, config.options), config.options)
    task_data = prepare_task_data(config.task_data, tasks, config.data, lambda _: None)
    check_task_data(tasks, ("val", "test"), data, task_data, config.train.num_workers)
    probe_metric = objective if task_of(objective, config.options) in ("few_shot", "knn") else "knn/top1"
    probe = _probe(task_of(probe_metric, config.options), config.options)
    left_out = _unusable(config, space, methods, data)
    if left_out and (config.methods or len(left_out) == len(methods)):
        raise ValueError(next(iter(left_out.values())))
    methods = tuple(m for m in methods if m not in left_out)
    base = {m: _base(config, space, m) for m in methods}
    context = _space_context(config, methods, data)
    return SweepSetup(config, space, context, base, tasks, probe, probe_metric, objective, left_out, task_data)


def _base(config: SweepConfig, space: SearchSpace, method: str) -> PretrainConfig:
    return with_parameters(preset(method, config.train, config.data), dict(space.fixed))


def _space_context(config: SweepConfig, methods: tuple[str, ...], data: PreparedData) -> SpaceContext:
    info = data.split("train")
    return SpaceContext(info.num_images, len(info.class_names), config.train.batch_size, config.train.epochs, methods)


def _unusable(config: SweepConfig, space: SearchSpace, methods: tuple[str, ...], data: PreparedData) -> dict[str, str]:
    """Method -> why it cannot run with these settings, tried at the settings of its first trial."""
    info = data.split("train")
    reasons = {}
    for method in methods:
        points = space.presets(_space_context(config, (method,), data)) if space.presets else [{}]
        run = with_parameters(_base(config, space, method), points[0])
        view_recipes(run)
        try:
            context = method_context(run, len(info.class_names), info.num_images)
            METHODS[method].method.validate(run.method_config, context)
        except ValueError as error:
            reasons[method] = str(error)
    return reasons


def _check_numbers(config: SweepConfig) -> None:
    if config.num_trials < 1:
        raise ValueError(f"--num-trials is {config.num_trials}; give at least 1.")
    if config.confirm < 0 or config.confirm == 1:
        raise ValueError(
            f"--confirm is {config.confirm}; give 0 (no confirmation) or at least 2 seeds: one gives no interval."
        )
    if config.train.epochs < 1:
        raise ValueError(
            f"--epochs is {config.train.epochs}; a sweep needs at least 1 (its baseline run covers epoch 0)."
        )


def _selected(config: SweepConfig, space: SearchSpace) -> tuple[str, ...]:
    unknown = [name for name in config.methods if name not in space.methods]
    if unknown:
        close = difflib.get_close_matches(unknown[0], space.methods, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"--methods: {', '.join(unknown)} not in space {space.name!r}.{hint} It has: {', '.join(space.methods)}."
        )
    return config.methods or space.methods


def _probe(task: str, options: Any) -> TaskConfigs:
    """The task that trials are compared by while they run: fewer few-shot tasks than in the objective itself."""
    own = getattr(options, task)
    return {task: replace(own, num_tasks=PROBE_TASKS) if hasattr(own, "num_tasks") else own}


def _with_objective(tasks: tuple[str, ...], objective: str, options: Any) -> list[str]:
    needed = task_of(objective, options)
    return list(tasks) if needed in tasks else [needed, *tasks]


def sweep_defaults() -> SweepConfig:
    """Defaults of the command: a sweep of minutes on two CPU cores."""
    train = TrainConfig(backbone="resnet9", stem="imagenet", image_size=32, batch_size=64, epochs=6)
    return SweepConfig(train=train)
