"""Images of single downstream tasks: ``--task-data detection=voc:DIR``; a task without them uses the run's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from evaluation import TASKS, Phase
from image_data.prepare import DataConfig, prepare
from image_data.prepared import PreparedData
from rayjobs.transfer import TaskConfigs, check_task

__all__ = ["TaskData", "check_task_data", "prepare_task_data"]


@dataclass(frozen=True)
class TaskData:
    """Prepared images and what they were prepared from, so that another node can prepare them too."""

    config: DataConfig
    prepared: PreparedData


def prepare_task_data(
    items: Sequence[str], tasks: TaskConfigs, config: DataConfig, log: Callable[[str], None]
) -> dict[str, TaskData]:
    """Prepare the data of ``TASK=URI`` items.

    Args:
        items: what the user gave.
        tasks: the chosen tasks.
        config: cache, seed and shares of splits are taken from it.
        log: receives what is prepared.

    Raises:
        ValueError: not of this form, a task that takes no data of its own or was not chosen; or bad data.
    """
    found: dict[str, TaskData] = {}
    takers = [name for name in tasks if TASKS[name].needs == "fine_tuning"]
    for item in items:
        name, equals, uri = item.partition("=")
        if not equals or ":" in name or name in found:
            raise ValueError(f"--task-data {item}: write TASK=URI, each task once, for example detection=voc:DIR.")
        if name not in takers:
            known = ", ".join(task for task, spec in TASKS.items() if spec.needs == "fine_tuning")
            raise ValueError(
                f"--task-data {item}: {name!r} is not among the chosen tasks that take images of their own "
                f"({', '.join(takers) or 'none chosen'}). Those that do are {known}; add it to --tasks."
            )
        own = DataConfig(data=(f"train={uri}",), cache=config.cache, data_seed=config.data_seed)
        own = replace(own, image_split=config.image_split, max_unreadable=config.max_unreadable)
        found[name] = TaskData(own, prepare(own, log=log))
    return found


def check_task_data(
    tasks: TaskConfigs,
    phases: Sequence[Phase],
    data: PreparedData,
    task_data: Mapping[str, TaskData],
    num_workers: int = 1,
) -> None:
    """Raise ValueError before any long work when the data cannot support a task."""
    for name, config in tasks.items():
        own = task_data[name].prepared if name in task_data else data
        for phase in phases:
            check_task(name, config, phase, own, num_workers)
