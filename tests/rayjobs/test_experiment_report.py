"""Reports of experiments that are made with the project's own tracking code, without training anything."""

from __future__ import annotations

import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import plotly.graph_objects as go
import pytest
from mlflow import MlflowClient
from PIL import Image
from scipy import stats

from rayjobs import compare, html_report
from rayjobs.comparison import Column
from rayjobs.configs import TrainConfig, preset, to_dict, with_parameters
from rayjobs.experiment_report import build_report, experiment_markdown
from rayjobs.experiment_runs import read_experiment
from rayjobs.html_report import html_page
from rayjobs.report_figures import LEAST_TRIALS, curves, importance, parallel_coordinates, swept
from rayjobs.tracking import Tracker
from rayjobs.trial_log import flat_parameters, log_epoch, log_transfer

SHOT, ONE = "few_shot/5way_5shot_acc", "few_shot/5way_1shot_acc"
OBJECTIVE = Column(SHOT, "5-way 5-shot", 1)
TRAIN = TrainConfig(backbone="resnet9", stem="small", image_size=32, batch_size=32, epochs=3)
DATA = {
    "source": ["rendered:"],
    "fingerprint": "f00d",
    "rule": "a rule",
    "splits": {"train": {"images": 64, "classes": 2}},
}
VALUES = {"exemplar_v2": (70.0, 71.0, 72.5), "moco_v2": (69.0, 70.5, 71.0), "random_init": (50.0, 51.0, 52.0)}


class FakeExperiment:
    """Writes runs as sweeps and comparisons do."""

    def __init__(self, store, folder, name, kind):
        self.folder, self.name = folder, name
        self.tracker = Tracker(name, folder / f"{name}.jsonl", uri=store, log=lambda _: None)
        self.parent = self.tracker.run(name, {"key": name, "kind": kind}) if kind else None
        if self.parent:
            self.parent.tags({"objective": SHOT})
            self.parent.json({"config": {}, "data": DATA}, "sweep.json" if kind == "sweep" else "started.json")

    def run(self, name, kind, config, phases, value, outcome="finished", label="", epochs=3):
        run = self.tracker.run(
            name,
            {"key": f"{self.name}/{name}", "kind": kind, "method": label or config.method, "outcome": outcome},
            self.parent,
        )
        run.params(flat_parameters(config))
        record = {"git": "abc123", "versions": {"torch": "2"}, "data": DATA}
        run.json({"config": to_dict(config), "record": record}, "config.json")
        for epoch in range(1, epochs + 1):
            log_epoch(run, {"epoch": epoch, "loss": 3.0 / epoch, "images_per_second": 64.0, "epoch_seconds": 2.0})
        if outcome == "crashed":
            run.text("Traceback\n  a line\nOutOfMemory: <9 GiB>", "error.txt")
        else:
            metrics = {SHOT: value, ONE: value - 10, "entropy/h_r": value / 20, "uniformity/raw": value / 10}
            full = {k: {"value": v, "ci95": 0.5 if k in (SHOT, ONE) else None, "n": 600} for k, v in metrics.items()}
            log_transfer(run, {phase: {"metrics": full, "protocol": {"phase": phase}} for phase in phases}, epochs)
        run.end("FINISHED" if outcome == "finished" else "FAILED")
        return run

    def close(self):
        if self.parent:
            self.parent.end("FINISHED")
        assert self.tracker.close(60)


def png(side=8):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def make_comparison(store, folder):
    fake = FakeExperiment(store, folder, "duel", "comparison")
    for label, values in VALUES.items():
        for seed, value in enumerate(values):
            is_baseline = label == "random_init"
            method = "supervised" if is_baseline else label
            train = {"seed": seed, "epochs": 0 if is_baseline else 3}
            config = with_parameters(preset(method, TRAIN), train)
            kind = "baseline" if is_baseline else "run"
            run = fake.run(f"{label}-seed{seed}", kind, config, ["test"], value, label=label, epochs=train["epochs"])
            if seed == 0 and not is_baseline:
                (folder / "cam").mkdir(exist_ok=True)
                (folder / "cam" / "grid.png").write_bytes(png())
                run.artifact(folder / "cam", "evaluation_test/cam")
    fake.run("moco_v2-seed3", "run", with_parameters(preset("moco_v2", TRAIN), {"seed": 3}), [], 0.0, "crashed")
    fake.close()


def make_sweep(store, folder):
    fake = FakeExperiment(store, folder, "search", "sweep")
    rng = np.random.default_rng(0)
    for i in range(8):
        rate = float(10 ** rng.uniform(-2, -0.5))
        config = with_parameters(
            preset("moco_v2", TRAIN), {"learning_rate": rate, "temperature": float(rng.uniform(0.05, 0.5))}
        )
        fake.run(f"moco_v2-{i:02d}", "trial", config, ["val"], 60 + 10 * np.log10(rate))
    for i, rate in enumerate((0.02, 0.05)):
        config = with_parameters(preset("supervised", TRAIN), {"learning_rate": rate})
        fake.run(f"supervised-{i:02d}", "trial", config, ["val"], 70.0 + i)
    fake.run("simsiam-10", "trial", preset("simsiam", TRAIN), [], 0.0, "crashed")
    untrained = with_parameters(preset("supervised", TRAIN), {"epochs": 0})
    fake.run("random_init-01", "baseline", untrained, ["val", "test"], 40.0, label="random_init", epochs=0)
    for seed in (1000, 1001):
        config = with_parameters(preset("supervised", TRAIN), {"learning_rate": 0.05, "seed": seed})
        fake.run(f"supervised-seed{seed}", "confirm", config, ["val", "test"], 71.0 + seed - 1000)
    full = {SHOT: {"value": 72.0, "ci95": 0.5, "n": 600}}
    log_transfer(fake.parent, {"test": {"metrics": full, "protocol": {}}}, 3)
    fake.parent.tags({"best_trial": "supervised-01", "best_method": "supervised"})
    fake.close()


def make_evaluations(store, folder):
    fake = FakeExperiment(store, folder, "evaluate", "")
    for temperature in (0.1, 0.2):
        for seed in (0, 1):
            config = with_parameters(preset("moco_v2", TRAIN), {"temperature": temperature, "seed": seed})
            run = fake.run(
                f"moco {temperature} {seed}", "evaluate", config, ["test"], 60 + seed + temperature, epochs=0
            )
            run.json({"data": DATA, "git": "abc123"}, "record.json")
    fake.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    for make in (make_comparison, make_sweep, make_evaluations):
        make(uri, folder)
    return uri


@pytest.fixture(scope="module")
def reports(store):
    return {name: build_report(read_experiment(name, store)) for name in ("duel", "search", "evaluate")}


def cells_of(table, name, metric=SHOT):
    return next(row for row in table.rows if row["name"] == name)["cells"][metric]


def test_a_comparison_has_one_row_per_method_over_its_seeds(reports):
    report = reports["duel"]
    (table,) = report.tables
    assert [row["name"] for row in table.rows] == ["moco_v2", "exemplar_v2", "random_init"]
    for label, values in VALUES.items():
        cell = cells_of(table, label)
        low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
        assert (cell["mean"], cell["ci95"]) == pytest.approx((np.mean(values), (high - low) / 2))
    assert [column.heading for column in table.columns] == ["5-way 1-shot", "5-way 5-shot", "H_R"]
    assert "1 of 4 crashed" in table.rows[0]["notes"]
    text = experiment_markdown(report)
    assert "| moco_v2 | 60.17 ± 2.59† | 70.17 ± 2.59† |" in text
    assert re.search(r"\| exemplar_v2 \| \*\*61.17 ± \d.\d\d\*\* \| \*\*71.17", text)
    assert "moco_v2-seed3 crashed: OutOfMemory: <9 GiB>" in text
    assert "fingerprint f00d" in text
    assert "Code: abc123" in text


def test_the_papers_claims_are_judged_by_the_runs_also_in_hidden_metrics(reports):
    verdicts = {item.ordering.claim: item for item in reports["duel"].judged}
    gaps = np.subtract(VALUES["exemplar_v2"], VALUES["moco_v2"])
    found = verdicts["Exemplar v2 beats MoCo v2, 5-shot"]
    assert found.found.mean == pytest.approx(gaps.mean())
    assert found.found.half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem(gaps))
    assert not any(column.metric == "uniformity/raw" for column in reports["duel"].tables[0].columns)
    runs = reports["duel"].tables[0].runs
    assert all("uniformity/raw" in run["metrics"] for run in runs if run["outcome"] == "finished")


def test_a_sweep_shows_each_methods_best_trial_and_the_winner_over_new_seeds(reports):
    validation, test = reports["search"].tables
    assert [row["name"] for row in validation.rows] == ["supervised", "moco_v2", "random_init"]
    best = cells_of(validation, "supervised")
    assert (best["mean"], best["ci95"], best["n"]) == (71.0, 0.5, 1), "one seed: the interval over its tasks"
    assert validation.rows[0]["notes"] == ["supervised-01: best of 2/2 trials"]
    assert "Without a finished trial: simsiam" in validation.legend
    assert [row["name"] for row in test.rows] == ["supervised-01 (winner)", "supervised, 2 new seeds", "random_init"]
    confirmed = cells_of(test, "supervised, 2 new seeds")
    assert confirmed["mean"] == 71.5
    assert confirmed["ci95"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.5)
    assert reports["search"].judged == [], "trials chosen by their own numbers judge no claim"


def test_evaluations_are_grouped_by_setting_and_data(reports):
    (table,) = reports["evaluate"].tables
    assert table.title == "Test data: rendered: (f00d)"
    assert [row["name"] for row in table.rows] == ["moco_v2 (temperature 0.1)", "moco_v2 (temperature 0.2)"]
    assert cells_of(table, "moco_v2 (temperature 0.1)")["values"] == [60.1, 61.1]


def test_compute_is_what_the_epochs_took(reports):
    run = reports["duel"].experiment.of_kind("run")[0]
    assert run.device_seconds == 6.0
    assert run.images_seen == 3 * 2.0 * 64.0
    assert run.error == ""


def test_importance_finds_what_matters_or_says_why_not(reports):
    trials = reports["search"].experiment.of_kind("trial")
    finished = [run for run in trials if run.outcome == "finished"]
    assert swept(finished) == ["learning_rate", "temperature"], "not the optimisers that differ between methods"
    figure = importance(trials, OBJECTIVE, "val")
    assert figure.data is not None
    go.Figure(figure.data)
    moco = next(trace for trace in figure.data["data"] if trace["name"] == "moco_v2 (8 trials)")
    shares = dict(zip(moco["y"], moco["x"], strict=True))
    assert shares["learning_rate"] > 0.7 > shares["temperature"]
    assert f"supervised: 2 finished, at least {LEAST_TRIALS} are needed" in figure.caption
    few = importance(trials[:3], OBJECTIVE, "val")
    assert few.data is None
    assert few.caption == "Not shown: moco_v2: 3 finished, at least 4 are needed."
    fixed = importance(reports["duel"].experiment.of_kind("run")[:3] * 2, OBJECTIVE, "test")
    assert "no hyperparameter varies" in fixed.caption


def test_parallel_coordinates_hold_what_a_method_lacks_apart(reports):
    figure = parallel_coordinates(reports["search"].experiment.of_kind("trial"), OBJECTIVE, "val")
    assert figure.data is not None
    go.Figure(figure.data)
    axes = {axis["label"]: axis for axis in figure.data["data"][0]["dimensions"]}
    assert list(axes) == ["method", "learning_rate", "temperature", "5-way 5-shot"]
    assert "none" in axes["temperature"]["ticktext"], "supervised training has no temperature"
    assert len(axes["temperature"]["values"]) == 10
    assert min(axes["learning_rate"]["values"]) < -1, "logarithmic"


def test_scaled_curves_lie_between_the_methods_extremes(reports):
    figure = curves(reports["duel"].experiment.of_kind("run"), "pretext/loss", "loss", is_scaled=True)
    assert figure.data is not None
    go.Figure(figure.data)
    assert figure.data["data"][0]["y"] == pytest.approx([1.0, 0.25, 0.0])
    values = figure.data["layout"]["updatemenus"][0]["buttons"][1]["args"][0]["y"][0]
    assert values == [3.0, 1.5, 1.0]


class Loads(HTMLParser):
    """What a page would fetch, and the ids of its figures."""

    def __init__(self):
        super().__init__()
        self.addresses, self.pictures, self.links = [], [], []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                kind = self.pictures if tag == "img" else self.links if tag == "a" else self.addresses
                kind.append(value)


@pytest.mark.parametrize("name", ["duel", "search", "evaluate"])
def test_the_page_needs_no_network(reports, name):
    text = html_page(reports[name])
    loads = Loads()
    loads.feed(text)
    assert loads.addresses == []
    assert all(link.startswith("#") for link in loads.links)
    assert all(source.startswith("data:image/") for source in loads.pictures)
    assert "default-src 'none'" in text
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    for figure in re.findall(r'type="application/json" id="[^"]+">(.*?)</script>', text, re.DOTALL):
        go.Figure(json.loads(figure))


def test_the_page_shows_tables_claims_pictures_and_failures(reports):
    text = html_page(reports["duel"])
    assert re.search(r'<td data-value="71.16\d+" class="best">71.17 ± 3.13</td>', text)
    assert "70.17 ± 2.59†" in text
    assert text.count("<figcaption>moco_v2-seed0</figcaption>") == 1
    assert "OutOfMemory: &lt;9 GiB&gt;" in text
    assert 'class="text not separated"' in text or 'class="text holds"' in text
    search = html_page(reports["search"])
    assert "parcoords" in search
    assert "<strong>simsiam-10</strong>" in search


def test_large_pictures_are_scaled_down(monkeypatch):
    monkeypatch.setattr(html_report, "LARGEST_PICTURE", 1000)
    monkeypatch.setattr(html_report, "WIDEST_PICTURE", 20)
    kind, data = html_report._data_uri(png(64)).split(",")
    assert kind == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (20, 20)
    assert html_report._data_uri(png(4)).startswith("data:image/png")


def test_the_command_prints_writes_and_logs(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setitem(sys.modules, "ray", None)  # neither a cluster nor Ray itself is needed
    docs = tmp_path / "table.md"
    compare.main(["--experiment", "duel", "--output", str(tmp_path), "--write-docs", str(docs)])
    printed = capsys.readouterr().out
    page = tmp_path / "duel" / "report.html"
    assert str(page) in printed
    assert "70.17 ± 2.59†" in printed
    assert "moco_v2-seed3 crashed: OutOfMemory: <9 GiB>" in printed
    assert "## The papers' orderings" in docs.read_text()
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("duel")
    (parent,) = client.search_runs([experiment.experiment_id], "tags.kind = 'comparison'")
    assert [file.path for file in client.list_artifacts(parent.info.run_id, "report")] == ["report/report.html"]
    assert parent.info.status == "FINISHED"
    compare.main(["--experiment", "evaluate", "--output", str(tmp_path)])
    compare.main(["--experiment", "evaluate", "--output", str(tmp_path)])
    evaluations = client.get_experiment_by_name("evaluate")
    (own,) = client.search_runs([evaluations.experiment_id], "tags.kind = 'report'")
    assert [file.path for file in client.list_artifacts(own.info.run_id, "report")] == ["report/report.html"]


def test_an_unknown_experiment_is_an_error_that_lists_the_known(store, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    with pytest.raises(SystemExit):
        compare.main(["--experiment", "serch"])
    error = " ".join(capsys.readouterr().err.split())
    assert "has no experiment 'serch'. Did you mean 'search'? It has: " in error
    assert "duel" in error
    with pytest.raises(ValueError, match="no MLflow store"):
        read_experiment("duel", "sqlite:////nowhere/mlflow.db")


def test_flags_of_a_run_are_refused_beside_experiment(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--experiment", "duel", "--epochs", "50", "--seeds", "5"])
    error = " ".join(capsys.readouterr().err.split())
    assert "--seeds, --epochs would have no effect" in error


def test_an_experiment_that_has_just_begun_has_no_table_yet(store, tmp_path):
    fake = FakeExperiment(store, tmp_path, "young", "comparison")
    fake.close()
    report = build_report(read_experiment("young", store))
    assert report.tables == []
    assert "No run with downstream metrics has finished yet." in html_page(report)
