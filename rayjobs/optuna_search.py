"""OptunaSearch that understands pruned trials and trials whose objective comes only with the last report.

Ray 2.60's own class needs the objective in every report, records trials stopped by a scheduler as complete, and leaves
a trial that ended without a finite value RUNNING for ever. Here intermediate reports feed the cheap metric to Optuna,
and a trial ends as COMPLETE, PRUNED or FAIL (crashed or diverged).
"""

from __future__ import annotations

import math
from typing import Any, cast

import optuna
from optuna.trial import TrialState
from ray.tune.search.optuna import OptunaSearch

__all__ = ["PruneAwareOptunaSearch"]


class PruneAwareOptunaSearch(OptunaSearch):
    """OptunaSearch for one objective that arrives once, and a proxy that arrives at milestones.

    Args:
        proxy: name of the intermediate metric in Tune's results; reports carry ``epoch`` too.
        **kwargs: as for OptunaSearch.
    """

    def __init__(self, *, proxy: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._proxy = proxy

    def _report(self, trial_id: str, result: dict[str, Any] | None) -> None:
        value = (result or {}).get(self._proxy)
        if value is None or not math.isfinite(value):
            return
        trial, epoch = self._ot_trials[trial_id], int(result["epoch"])  # type: ignore[index]
        if epoch in trial.study._storage.get_trial(trial._trial_id).intermediate_values:
            return  # a resumed trial passes its last milestone again
        trial.report(float(value), epoch)

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Feed the proxy's value at this milestone to Optuna."""
        self._report(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna the objective, or that the trial was pruned or failed."""
        if trial_id in self._completed_trials:
            return
        value = (result or {}).get(self.metric)
        trial, study = self._ot_trials[trial_id], cast(optuna.Study, self._ot_study)
        if error or (result or {}).get("diverged"):
            study.tell(trial, state=TrialState.FAIL)
        elif value is not None and math.isfinite(value):
            study.tell(trial, float(value))
        else:
            self._report(trial_id, result)  # the report that made the scheduler stop the trial reaches only this hook
            study.tell(trial, state=TrialState.PRUNED)
        self._completed_trials.add(trial_id)
