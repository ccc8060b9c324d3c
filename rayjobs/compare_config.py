"""The compare command's configuration, and the checks that run before any worker starts."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from image_data.prepare import DataConfig
from image_data.prepared import PreparedData
from methods import METHODS
from rayjobs.cli import differences
from rayjobs.comparison import columns_of, judged_metric
from rayjobs.configs import PretrainConfig, TrainConfig, preset, with_parameters
from rayjobs.job import view_recipes
from rayjobs.sweep_config import checked_batch
from rayjobs.task_data import TaskData, check_task_data, prepare_task_data
from rayjobs.task_options import TaskOptions, chosen_tasks
from rayjobs.train_loop import method_context
from rayjobs.transfer import TaskConfigs
from search_spaces import SpaceContext
from search_spaces.parameters import preset_parameters

__all__ = [
    "CompareConfig",
    "CompareSetup",
    "changed_settings",
    "check_report_only",
    "compare_defaults",
    "prepare_comparison",
]


@dataclass(frozen=True)
class CompareConfig:
    """The same budget for every method: train each method's published settings with several seeds, judge on test data.

    Attributes:
        methods: methods to compare; empty takes all that can run with these settings.
        seeds: runs per method, with seeds --seed, --seed + 1, ...; at least 2, since one gives no interval.
        tasks: downstream tasks of the table; frozen stands for all on frozen features that need nothing but a
            checkpoint's own data, downstream for all that fine-tune.
        task_data: images of single fine-tuning tasks, as TASK=URI (detection=voc:DIR).
        name: name of the comparison: folder under --output and MLflow experiment; empty makes one from the time.
        output: folder (or URI that all nodes reach) of results and checkpoints.
        resume: continue an interrupted comparison: finished runs stay. A finished one is only written again.
        write_docs: also write the Markdown table to this file.
        experiment: run nothing; read this finished or running MLflow experiment (of a sweep, comparison or evaluation),
            print its tables and write its page.
        options: options of the tasks.
        train: training settings, the same for all methods.
        data: images, splits, subsets.
    """

    methods: tuple[str, ...] = ()
    seeds: int = 3
    tasks: tuple[str, ...] = ("few_shot", "linear", "knn", "entropy", "uniformity")
    task_data: tuple[str, ...] = ()
    name: str = ""
    output: str = "results"
    resume: bool = False
    write_docs: str = ""
    experiment: str = ""
    options: TaskOptions = field(default_factory=TaskOptions)  # pyright: ignore[reportInvalidTypeForm] - made of TASKS
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds of each method's runs."""
        return tuple(self.train.seed + i for i in range(self.seeds))


@dataclass(frozen=True)
class CompareSetup:
    """A checked comparison: nothing in it can fail for a reason that the user could have been told before.

    Attributes:
        config: what the user asked for.
        base: method -> the configuration of its runs, in the order of ``METHODS``.
        baselines: method whose untrained backbone is a row of its own -> its configuration; one per kind of backbone.
        tasks: downstream tasks of the table; frozen stands for all that need nothing but a checkpoint's own data.
        objective: metric that the notes and the plot judge by.
        left_out: method -> why it cannot run with these settings.
        task_data: images of single tasks.
    """

    config: CompareConfig
    base: dict[str, PretrainConfig]
    baselines: dict[str, PretrainConfig]
    tasks: TaskConfigs
    objective: str
    left_out: dict[str, str]
    task_data: dict[str, TaskData] = field(default_factory=dict)


def prepare_comparison(config: CompareConfig, data: PreparedData) -> CompareSetup:
    """Check the whole comparison against the data.

    Raises:
        ValueError: what is wrong, what is allowed, how to fix it. A method that cannot run here is an error when the
            user named it; otherwise it is left out, and ``left_out`` says why.
    """
    _check_numbers(config)
    checked_batch(config.train, data)
    tasks = chosen_tasks(config.tasks, config.options)
    if "domains" in tasks:
        raise ValueError(
            "--tasks domains needs further data sets, which only rayjobs/evaluate.py takes (--domains NAME=URI): drop "
            "it here, and evaluate the checkpoints with it afterwards."
        )
    task_data = prepare_task_data(config.task_data, tasks, config.data, lambda _: None)
    check_task_data(tasks, ["test"], data, task_data, config.train.num_workers)
    base, left_out = {}, {}
    for method in _selected(config):
        try:
            base[method] = _configured(config, method, data)
        except ValueError as error:
            left_out[method] = str(error)
    if left_out and (config.methods or not base):
        name, reason = next(iter(left_out.items()))
        raise ValueError(f"{name} cannot run with these settings: {reason}")
    objective = judged_metric(columns_of(tasks))
    return CompareSetup(config, base, _baselines(base), tasks, objective, left_out, task_data)


def check_report_only(config: CompareConfig) -> None:
    """Raise ValueError when ``--experiment``, which runs nothing, comes with flags of a run."""
    defaults = compare_defaults()
    used = {"experiment", "output", "write_docs"}
    idle = [name for name in differences(config, defaults, defaults) if name not in used]
    if idle:
        flags = ", ".join(f"--{name.removeprefix('train.').replace('_', '-')}" for name in idle)
        raise ValueError(
            f"--experiment {config.experiment} reads what has been run; {flags} would have no effect. Drop it, or drop "
            "--experiment to run a comparison."
        )
    if config.write_docs:
        _check_docs(Path(config.write_docs).expanduser())


def changed_settings(config: PretrainConfig) -> dict[str, list[Any]]:
    """Hyperparameters that differ from the method's preset: name -> [preset, used]."""
    original = preset(config.method, config.train, config.data)
    found = {}
    for part in ("method_config", "optimizer"):
        before, after = asdict(getattr(original, part)), asdict(getattr(config, part))
        found |= {name: [before[name], value] for name, value in after.items() if value != before[name]}
    return found


def compare_defaults() -> CompareConfig:
    """Defaults of the command: the default sweep's network and data, with the least size that leaves 2x2 locations.

    At 32 px one location is left, of which CAMtrast and AMDIM can make nothing.
    """
    train = TrainConfig(backbone="resnet9", stem="imagenet", image_size=36, batch_size=64, epochs=6)
    return CompareConfig(train=train)


def _configured(config: CompareConfig, method: str, data: PreparedData) -> PretrainConfig:
    """A method's preset, moved into what the data and the length of the run can hold; ValueError if it cannot run."""
    info = data.split("train")
    train = config.train
    space = SpaceContext(info.num_images, len(info.class_names), train.batch_size, train.epochs, (method,))
    run = with_parameters(preset(method, train, config.data), preset_parameters(method, space))
    view_recipes(run)
    context = method_context(run, len(info.class_names), info.num_images)
    METHODS[method].method.validate(run.method_config, context)
    return run


def _baselines(base: Mapping[str, PretrainConfig]) -> dict[str, PretrainConfig]:
    """One method per kind of backbone; "supervised", whose backbone starts as torchvision's, stands for the usual."""
    found: dict[str, str] = {}
    for method in base:
        kind = METHODS[method].color_space
        found.setdefault(kind, "supervised" if kind == METHODS["supervised"].color_space else method)
    first = next(iter(base.values()))
    return {method: preset(method, first.train, first.data) for method in found.values()}


def _check_numbers(config: CompareConfig) -> None:
    if config.seeds < 2:
        raise ValueError(f"--seeds is {config.seeds}; give at least 2: one run gives no interval.")
    if config.train.epochs < 1:
        raise ValueError(
            f"--epochs is {config.train.epochs}; give at least 1. Untrained backbones are rows of every comparison."
        )
    if config.train.views:
        raise ValueError(
            f"--views {' '.join(config.train.views)}: a comparison trains each method with the views of its paper. "
            "Drop --views, or train one method with rayjobs/pretrain.py."
        )
    if not config.tasks:
        raise ValueError("--tasks is empty; name at least one downstream task, or drop the option.")
    if config.write_docs:
        _check_docs(Path(config.write_docs).expanduser())


def _check_docs(path: Path) -> None:
    if path.suffix != ".md" or path.is_dir():
        raise ValueError(f"--write-docs {path} is not the name of a Markdown file; give one that ends in .md.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"--write-docs {path}: the folder {path.absolute().parent} does not exist. Create it first.")


def _selected(config: CompareConfig) -> tuple[str, ...]:
    """The methods in the order of the table."""
    unknown = [name for name in config.methods if name not in METHODS]
    if unknown:
        close = difflib.get_close_matches(unknown[0], METHODS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"--methods: unknown {', '.join(unknown)}.{hint} The methods are: {', '.join(METHODS)}.")
    return tuple(name for name in METHODS if not config.methods or name in config.methods)
