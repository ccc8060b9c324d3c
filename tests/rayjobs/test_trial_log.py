"""Trials on the driver: what of a run's end reaches MLflow and the terminal, and what its record holds."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from image_data import RECIPES
from image_data.prepare import DataConfig
from image_data.recipes import ViewRecipe
from methods import METHODS
from rayjobs.configs import TrainConfig, config_hash, preset, with_parameters
from rayjobs.ray_tune import SweepPlan, final_report, run_name
from rayjobs.record import run_record, trial_record
from rayjobs.reports import print_report
from rayjobs.transfer import TransferResult
from rayjobs.trial_log import TrialLog, collapse_text, has_collapsed


class Run:
    """Stands for a run of MLflow."""

    def __init__(self) -> None:
        self.tags_set: dict[str, str] = {}
        self.files: dict[str, Any] = {}
        self.status = ""

    def tags(self, values):
        self.tags_set |= values

    def json(self, value, name):
        self.files[name] = value

    def end(self, status):
        self.status = status

    def params(self, values): ...

    def metrics(self, values, step=0): ...

    def curve(self, name, points): ...


def make_plan(data, **changes: Any) -> SweepPlan:
    base = preset("simsiam", TrainConfig(epochs=2), data_config_of(data))
    job: Any = SimpleNamespace(record=run_record(base, data))
    values: dict[str, Any] = dict(
        base={"simsiam": base},
        jobs={"simsiam": job},
        tasks={},
        objective="knn/top1",
        direction="maximize",
        storage="/nowhere",
        name="s",
        num_trials=2,
        max_concurrent=1,
        seed=0,
    )
    return SweepPlan(**{**values, **changes})


def data_config_of(data):
    return DataConfig(data=data.source)


@pytest.fixture
def log(data, tmp_path):
    runs: dict[str, Run] = {}

    def open_run(name, tags, parent):
        runs[name] = Run()
        return runs[name]

    tracker: Any = SimpleNamespace(run=open_run)
    parent: Any = None
    console = Console(file=io.StringIO(), width=200)
    made = TrialLog(make_plan(data), tracker, parent, console, "trial", 2, tmp_path / "numbers.json")
    return SimpleNamespace(log=made, runs=runs, text=lambda: console.file.getvalue())  # type: ignore[attr-defined]


def test_a_collapsed_trial_is_tagged_when_it_was_stopped(log):
    log.log.trial_started("a", {"learning_rate": 0.3})
    report = {"epoch": 1, "loss": -1.0, "feature_spread": 0.02}
    log.log.trial_reported("a", report)
    log.log.trial_ended("a", report, None)
    run = log.runs["simsiam-01"]
    assert run.tags_set == {"collapsed": "true", "outcome": "pruned"}
    assert "collapsed: feature_spread 0.02" in log.text()


def test_a_healthy_trial_has_no_such_tag(log):
    log.log.trial_started("a", {"learning_rate": 0.3})
    report = {"epoch": 1, "loss": -1.0, "feature_spread": 0.9}
    log.log.trial_reported("a", report)
    log.log.trial_ended("a", report, None)
    assert "collapsed" not in log.runs["simsiam-01"].tags_set
    assert "collapsed" not in log.text()


def test_the_final_report_keeps_the_collapse():
    last = {"epoch": 2, "loss": -1.0, "feature_spread": 0.02, "images_per_second": 100.0, "curve": [[1, 2.0, 0.1]]}
    result = TransferResult([], {})
    result = SimpleNamespace(value=lambda name: 20.0, to_json=result.to_json)
    report = final_report({"val": result}, 3, "knn/top1", "/path", last)  # type: ignore[dict-item]
    stored = json.loads(json.dumps(report))
    assert stored["collapsed"] is True
    assert has_collapsed(stored)
    assert stored["pretext"] == {k: v for k, v in last.items() if k != "curve"}
    assert not has_collapsed(final_report({"val": result}, 1, "knn/top1", "/path", {"epoch": 0}))  # type: ignore[dict-item]


def test_collapse_text_says_what_it_means_and_what_to_try():
    text = collapse_text({"feature_spread": 0.0213})
    for words in ("features of all images are nearly the same", "feature_spread 0.02", "about 1", "--learning-rate"):
        assert words in text


def test_the_sweep_table_marks_collapsed_trials():
    def trial(name, outcome, collapsed):
        metrics = {"knn/top1": {"value": 20.0, "ci95": 1.0}}
        common = {"name": name, "sampled": {"learning_rate": 0.1}, "epoch": 2, "collapsed": collapsed}
        return {**common, "outcome": outcome, "objective": 20.0, "transfer": {"val": {"metrics": metrics}}}

    trials = [trial("simsiam-01", "finished", True), trial("simsiam-02", "finished", False)]
    results = {
        "objective": "knn/top1",
        "direction": "maximize",
        "rule": "a rule",
        "trials": [*trials, trial("simsiam-03", "pruned", True)],
        "baseline": [trial("random_init-01", "finished", False)],
    }
    console = Console(file=io.StringIO(), width=160)
    print_report(results, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = {line.split("│")[1].strip(): line for line in text.splitlines() if line.count("│") > 2}
    assert "collapsed" in rows["simsiam-01"]
    assert "collapsed" not in rows["simsiam-02"]
    assert "collapsed" in rows["simsiam-03"]
    assert "2 collapsed" in text
    assert "simsiam-01, simsiam-03" in text


@pytest.mark.parametrize("method", list(METHODS))
def test_the_record_holds_every_parameter_of_the_views(method, data):
    record = json.loads(json.dumps(run_record(preset(method, data=data_config_of(data)), data)))
    assert [ViewRecipe.from_json(view) for view in record["views"]] == [RECIPES[n] for n in METHODS[method].views]


def test_chosen_views_are_the_recorded_ones(data):
    config = with_parameters(preset("supervised", data=data_config_of(data)), {"views": ("moco_v1",)})
    assert run_record(config, data)["views"] == [RECIPES["moco_v1"].to_json()]


def test_a_trial_has_a_record_of_its_own(log, data):
    log.log.trial_started("a", {"learning_rate": 0.3, "seed": 5})
    stored = log.runs["simsiam-01"].files["config.json"]
    base = preset("simsiam", TrainConfig(epochs=2), data_config_of(data))
    config = with_parameters(base, {"learning_rate": 0.3, "seed": 5})
    assert stored["record"]["config_hash"] == config_hash(config) != config_hash(base)
    assert stored["record"]["seed"] == 5
    assert stored["record"]["parameters"] == {"learning_rate": 0.3, "seed": 5}
    assert stored["record"] == trial_record(
        run_record(base, data) | {"created": stored["record"]["created"]}, config, {"learning_rate": 0.3, "seed": 5}
    )


def test_names_of_runs(data):
    plan = make_plan(data)
    trained = with_parameters(plan.base["simsiam"], {"seed": 7})
    untrained = with_parameters(trained, {"epochs": 0})
    assert run_name(plan, trained, 3) == "simsiam-03"
    assert run_name(plan, untrained, 3) == "random_init-03"
    assert run_name(make_plan(data, named_by_seed=True), trained, 3) == "simsiam-seed7"


def test_the_trial_table_names_hyperparameters_shortly():
    from rayjobs.reports import _parameters

    sampled = {"method": "moco_v2", "temperature": 0.2, "queue_size": 1024, "momentum": 0.999, "learning_rate": 0.0312}
    assert _parameters({"sampled": sampled}) == "tau 0.2 K 1024 m 0.999 lr 0.0312"
    assert _parameters({"sampled": {"warmup_epochs": 1}, "collapsed": True}) == "warm-up 1 [yellow]collapsed[/yellow]"
