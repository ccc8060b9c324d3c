"""Rests for Ray Data's scheduling loop, which would take CPU time from the training beside it."""

from __future__ import annotations

import time
from typing import Any

from ray.data._internal.execution.execution_callback import ExecutionCallback

__all__ = ["LONGEST_REST_SECONDS", "RestWhenIdle"]

# Rests of Ray's scheduling loop when it has nothing to move: the first, doubled up to the longest.
FIRST_REST_SECONDS, LONGEST_REST_SECONDS = 0.001, 0.032


class RestWhenIdle(ExecutionCallback):
    """Keeps Ray's scheduling loop from spinning while training is the slower side.

    The loop waits until a task has a batch ready, also while back-pressure keeps it from taking that batch: at full
    buffers it spins (Ray 2.60). A step that moved nothing is therefore followed by a rest.
    """

    def __init__(self) -> None:
        self._moved: list[int] = []
        self._rest = FIRST_REST_SECONDS

    def on_execution_step(self, executor: Any) -> None:
        metrics = [operator._metrics for operator in executor._topology]
        moved = [m.num_tasks_submitted + m.num_task_outputs_generated + m.num_outputs_taken for m in metrics]
        if moved == self._moved:
            time.sleep(self._rest)
            self._rest = min(2 * self._rest, LONGEST_REST_SECONDS)
        else:
            self._moved, self._rest = moved, FIRST_REST_SECONDS
