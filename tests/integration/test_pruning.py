"""What a restored sweep knows of the milestones that its trials passed before."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray import tune
from ray.tune.schedulers import TrialScheduler

from rayjobs.ray_tune import stored_milestones
from rayjobs.tune_schedulers import ResumableASHA

VALUES = {"good": {1: 60.0, 2: 70.0}, "bad": {1: 20.0}, "fair": {1: 50.0}, "silent": {}}


def trial(config: dict[str, Any]) -> None:
    for epoch in (1, 2):
        values = VALUES[config["point"]]
        tune.report({"epoch": epoch} | ({"proxy": values[epoch]} if epoch in values else {}))


def make_scheduler() -> ResumableASHA:
    return ResumableASHA(time_attr="epoch", metric="proxy", mode="max", max_t=6, grace_period=1, reduction_factor=2)


@pytest.mark.parametrize(("value", "action"), [(65.0, TrialScheduler.CONTINUE), (30.0, TrialScheduler.STOP)])
def test_a_restored_sweep_prunes_against_the_trials_before(value, action):
    new: Any = SimpleNamespace(trial_id="new")
    result = {"epoch": 1, "proxy": value}
    forgetful, scheduler = make_scheduler(), make_scheduler()
    for trial_id, values in VALUES.items():
        scheduler.recall(trial_id, values)
    for each in (forgetful, scheduler):
        each.on_trial_add(MagicMock(), new)  # type: ignore[arg-type]
    assert forgetful.on_trial_result(None, new, result) == TrialScheduler.CONTINUE  # type: ignore[arg-type]
    assert scheduler.on_trial_result(None, new, result) == action  # type: ignore[arg-type]


def test_the_first_trials_at_a_milestone_go_on():
    scheduler = make_scheduler()
    actions = []
    for i, value in enumerate((60.0, 50.0, 40.0, 30.0)):
        new: Any = SimpleNamespace(trial_id=str(i))
        scheduler.on_trial_add(MagicMock(), new)
        actions.append(scheduler.on_trial_result(None, new, {"epoch": 1, "proxy": value}))  # type: ignore[arg-type]
    assert actions == [TrialScheduler.CONTINUE] * 3 + [TrialScheduler.STOP]


def test_milestones_are_read_from_what_tune_stored(ray_cluster, tmp_path):
    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": 1}),
        param_space={"point": tune.grid_search(list(VALUES))},
        tune_config=tune.TuneConfig(max_concurrent_trials=1, reuse_actors=True),  # one process to start
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path), verbose=0),
    )
    grid = tuner.fit()
    found = stored_milestones(str(tmp_path / "tune"))
    expected = {t.trial_id: VALUES[t.config["point"]] for t in grid._experiment_analysis.trials}
    assert {key: value for key, value in found.items() if value} == {k: v for k, v in expected.items() if v}
