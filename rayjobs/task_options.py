"""Options of every downstream task as flags: ``--few-shot.shots 1 5 10``, ``--knn.num-neighbors 20``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from evaluation import TASKS

__all__ = ["DEFAULT_FROZEN", "DOWNSTREAM_SUITE", "FROZEN_SUITE", "TaskOptions", "chosen_tasks"]

# Every task on frozen features that any checkpoint's own data allow in a few passes over them: no further data sets, no
# hundred passes (linear_readoff), no minutes per image (inversion).
FROZEN_SUITE = tuple(
    name
    for name, spec in TASKS.items()
    if spec.needs != "fine_tuning" and name not in ("domains", "linear_readoff", "inversion")
)
# Every downstream task that fine-tunes the backbone; layer_freezing is a grid of them for one question of its own.
DOWNSTREAM_SUITE = tuple(
    name for name, spec in TASKS.items() if spec.needs == "fine_tuning" and name != "layer_freezing"
)
DEFAULT_FROZEN = ("linear", "knn", "few_shot", "entropy", "uniformity")
_SUITES = {"frozen": FROZEN_SUITE, "downstream": DOWNSTREAM_SUITE}

TaskOptions: Any = dataclasses.make_dataclass(
    "TaskOptions",
    [(name, type(spec.config), dataclasses.field(default=spec.config)) for name, spec in TASKS.items()],
    frozen=True,
    namespace={"__module__": __name__},  # found by pickle under this name
)
TaskOptions.__doc__ = "Options of the downstream tasks, one group each; used where the task is among --tasks."


def chosen_tasks(names: Sequence[str], options: Any) -> dict[str, Any]:
    """The chosen tasks with their options; "frozen" and "downstream" stand for suites.

    Args:
        names: tasks; none lets every option pass (the caller decides by the data).
        options: a ``TaskOptions``.

    Raises:
        ValueError: an unknown task, or options of a task that was not chosen (an option is never ignored).
    """
    wanted = list(dict.fromkeys(task for name in names for task in _SUITES.get(name, (name,))))
    unknown = [name for name in wanted if name not in TASKS]
    if unknown:
        raise ValueError(
            f"Unknown task {', '.join(unknown)}. Known tasks: {', '.join(TASKS)}; frozen stands for "
            f"{', '.join(FROZEN_SUITE)}, and downstream for {', '.join(DOWNSTREAM_SUITE)}."
        )
    if not names:
        return {}
    unused = [name for name in TASKS if name not in wanted and getattr(options, name) != TASKS[name].config]
    if unused:
        raise ValueError(
            f"Options of {', '.join(unused)} were given, but --tasks is {' '.join(names)}. Add the task to --tasks, or "
            "drop its options."
        )
    return {name: getattr(options, name) for name in wanted}
