"""States of Optuna trials after Tune's hooks."""

from __future__ import annotations

import math
import pickle
import warnings

from optuna.trial import TrialState

from rayjobs.optuna_search import PruneAwareOptunaSearch


def space(trial):
    trial.suggest_float("x", 0, 1)


def make():
    return PruneAwareOptunaSearch(proxy="proxy", space=space, metric="objective", mode="max", seed=0)


def states(search):
    return [t.state for t in search._ot_study.trials]


def test_each_ending_has_its_state():
    search = make()
    for name in ("done", "pruned", "crashed", "diverged", "nan"):
        search.suggest(name)
    for name in ("done", "pruned"):
        search.on_trial_result(name, {"epoch": 1, "proxy": 40.0, "training_iteration": 1})
    search.on_trial_complete("done", {"epoch": 3, "objective": 55.0})
    search.on_trial_complete("pruned", {"epoch": 2, "proxy": 30.0})
    search.on_trial_complete("crashed", {"epoch": 2, "proxy": 30.0}, error=True)
    search.on_trial_complete("diverged", {"epoch": 0, "diverged": "nan in step 3"})
    search.on_trial_complete("nan", {"epoch": 3, "objective": math.nan})
    assert states(search) == [
        TrialState.COMPLETE,
        TrialState.PRUNED,
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.PRUNED,
    ]
    trials = search._ot_study.trials
    assert trials[0].value == 55.0
    assert trials[1].intermediate_values == {1: 40.0, 2: 30.0}


def test_a_milestone_passed_again_after_a_resume_is_no_news():
    search = make()
    search.suggest("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            search.on_trial_result("a", {"epoch": 1, "proxy": 40.0, "training_iteration": 1})
    assert search._ot_study.trials[0].intermediate_values == {1: 40.0}


def test_reports_without_the_objective_are_fine():
    search = make()
    search.suggest("a")
    search.on_trial_result("a", {"epoch": 1, "loss": 2.0, "training_iteration": 1})
    assert states(search) == [TrialState.RUNNING]


def test_history_survives_pickling(tmp_path):
    search = make()
    search.suggest("a")
    search.on_trial_complete("a", {"epoch": 1, "objective": 1.0})
    search.save(str(tmp_path / "state"))
    other = make()
    other.restore(str(tmp_path / "state"))
    assert [t.value for t in other._ot_study.trials] == [1.0]
    pickle.dumps(other._ot_study.trials)
