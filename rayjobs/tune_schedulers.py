"""Ray Tune's schedulers as a sweep needs them: one that prunes, one that does not, and both safe against a kill."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler

__all__ = ["ResumableASHA", "ResumableFIFO"]

STARTUP_TRIALS = 3  # that pass a milestone unjudged: against a single trial, half of all good settings would stop


class _SavesAtOnce:
    """Has Tune save the sweep's state before a new trial starts, and in the step in which a trial ends.

    A killed driver then forgets no trial that has started and repeats none that has finished.
    """

    _has_new_trial = False

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)  # type: ignore[misc]
        self._has_new_trial = True

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        # Tune asks after it has added trials (also those of a restored sweep, all of them) and before it starts any.
        if self._has_new_trial:
            self._has_new_trial = False
            tune_controller._tune_controller.checkpoint(force=True, wait=True)  # past a wrapper that warns
        return super().choose_trial_to_run(tune_controller)  # type: ignore[misc]

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        super().on_trial_complete(tune_controller, trial, result)  # type: ignore[misc]
        tune_controller._checkpoint_manager._should_force_sync_up = True


class ResumableFIFO(_SavesAtOnce, FIFOScheduler):
    """No pruning."""


class ResumableASHA(_SavesAtOnce, ASHAScheduler):
    """ASHA that judges nobody before some trials have passed the milestone, and that can be given the results of an
    earlier start of the sweep, which Tune 2.60 forgets."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        before = sum(
            len(recorded) for milestone, recorded in self._brackets[0]._rungs if milestone == result.get("epoch")
        )
        action = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if before < STARTUP_TRIALS else action

    def recall(self, trial_id: str, values: Mapping[int, float]) -> None:
        """Fill the rungs with a trial's metric after each of its milestones (epoch -> value)."""
        trial: Any = SimpleNamespace(trial_id=trial_id)
        sign = 1.0 if self._mode == "max" else -1.0
        for epoch, value in sorted(values.items()):
            self._brackets[0].on_result(trial, epoch, sign * value)
