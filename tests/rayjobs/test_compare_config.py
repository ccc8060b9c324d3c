"""What a comparison decides before it starts: methods, settings, untrained backbones; and how its report reads."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest

from methods import METHODS
from rayjobs.compare_config import CompareConfig, changed_settings, prepare_comparison
from rayjobs.comparison import build_rows, columns_of
from rayjobs.comparison_report import markdown, save_plot
from rayjobs.configs import TrainConfig, preset, to_dict
from rayjobs.transfer import task_configs

SHOT = "few_shot/5way_5shot_acc"
LAB = [name for name, spec in METHODS.items() if spec.color_space == "lab"]


@pytest.fixture
def config(data_config):
    train = TrainConfig(backbone="resnet9", stem="small", image_size=32, batch_size=32, epochs=20, seed=5)
    return CompareConfig(train=train, data=data_config)


def test_all_methods_with_the_same_training_in_the_order_of_the_table(config, data):
    setup = prepare_comparison(config, data)
    assert list(setup.base) == list(METHODS)
    assert not setup.left_out
    assert {run.train for run in setup.base.values()} == {config.train}
    assert config.all_seeds == (5, 6, 7)
    assert setup.objective == SHOT
    kinds = [METHODS[method].color_space for method in setup.baselines]
    assert sorted(kinds) == sorted({spec.color_space for spec in METHODS.values()}), "a baseline per kind of backbone"


def test_settings_are_the_presets_where_the_data_can_hold_them(config, data):
    setup = prepare_comparison(config, data)
    images = data.split("train").num_images
    for method, run in setup.base.items():
        assert run.optimizer.warmup_epochs <= config.train.epochs / 10, method
        assert getattr(run.method_config, "queue_size", 0) <= images
    assert changed_settings(setup.base["moco_v2"])["queue_size"][0] == 65536
    assert changed_settings(setup.base["supervised"]) == {}


def test_a_method_that_cannot_run_is_left_out_unless_it_was_named(config, data):
    coarse = replace(config, train=replace(config.train, stem="imagenet"))
    setup = prepare_comparison(coarse, data)
    assert "single location" in setup.left_out["camtrast_moco"]
    assert "camtrast_moco" not in setup.base
    with pytest.raises(ValueError, match=r"camtrast_moco cannot run.*single location"):
        prepare_comparison(replace(coarse, methods=("supervised", "camtrast_moco")), data)


def test_methods_with_another_backbone_have_another_baseline(config, data):
    only = prepare_comparison(replace(config, methods=(LAB[0],)), data)
    assert list(only.baselines) == [LAB[0]]
    assert list(prepare_comparison(replace(config, methods=("moco_v2",)), data).baselines) == ["supervised"]


def example_results():
    columns = columns_of(task_configs(["few_shot"]))

    def run(label, seed, value, outcome="finished"):
        metrics = {c.metric: {"value": value} for c in columns} if outcome == "finished" else {}
        return {"name": f"{label}-seed{seed}", "label": label, "seed": seed, "outcome": outcome, "collapsed": False,
                "seconds": 1.0, "pretext": {}, "metrics": metrics, "error": "OutOfMemory"}  # fmt: skip

    good = [run("moco_v2", 0, 80.0), run("moco_v2", 1, 80.5)]
    bad = [run("simsiam", 0, 40.0), run("simsiam", 1, None, "crashed")]
    untrained = [run("random_init", 0, 60.0), run("random_init", 1, 60.5)]
    of = dict.fromkeys(("moco_v2", "simsiam"), "random_init")
    rows = build_rows({"moco_v2": good, "simsiam": bad}, {"random_init": untrained}, of, columns, SHOT)
    hardware = {"cpus": 2, "gpus": 0, "machine": "x86_64", "runs_at_once": 1}
    train = TrainConfig(backbone="resnet9", stem="small", epochs=1)
    changes = {"moco_v2": {"queue_size": [65536, 128]}, "simsiam": {}}
    return {
        "name": "duel",
        "command": "python rayjobs/compare.py --seeds 2",
        "created": "2026-01-02T03:04:05+00:00",
        "seconds": 4000.0,
        "starts": [{"git": "abc", "versions": {"torch": "2"}, "hardware": hardware}],
        "settings": to_dict(CompareConfig(train=train)),
        "seeds": [0, 1],
        "data": {"source": ["rendered:"], "fingerprint": "f00", "rule": "a rule", "splits": {}},
        "objective": SHOT,
        "columns": [asdict(column) for column in columns],
        "methods": {m: {"changed": c, "config": to_dict(preset(m))} for m, c in changes.items()},
        "left_out": {"cmc": "cmc needs more images."},
        "rows": rows,
        "runs": good + bad + untrained,
    }


def test_the_report_says_what_was_done_and_what_is_missing():
    text = markdown(example_results(), "plots/x.png")
    assert "```\npython rayjobs/compare.py --seeds 2\n```" in text
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert table[0] == "| method | 5-way 1-shot | 5-way 5-shot | images/s | note |"
    assert len({line.count("|") for line in table}) == 1
    assert table[2].startswith("| moco_v2 | **80.25 ± 3.18** | **80.25 ± 3.18** |")
    assert table[3] == "| simsiam | 40.00 | 40.00 |  | 1 of 2 crashed, one run: no interval |"
    assert table[4].startswith("| random init | 60.25 ± 3.18 |")
    for words in (
        "fingerprint `f00`",
        "1 epoch, batch",
        "1:06:40 h on 2 CPUs (x86_64), no GPU, up to 1 run at once; code abc; torch 2",
        "- moco_v2: queue_size 65536 → 128",
        "- left out, cmc: needs more images.",
        "- simsiam-seed1 crashed: OutOfMemory",
        "not comparable with the table",
        "67.5 (K=65536 tau=0.2)",
        "![5-way 5-shot by method](plots/x.png)",
    ):
        assert words in text


def test_the_report_judges_the_papers_orderings():
    results = example_results()
    assert "orderings" not in markdown(results), "no claim about moco_v2 and simsiam"
    for i, run in enumerate(results["runs"][:4]):
        run.update(label="exemplar_v2" if i < 2 else "moco_v2", outcome="finished")
        run["metrics"] = {"few_shot/5way_5shot_acc": {"value": 80.0 + i % 2 if i < 2 else 70.0 + i % 2}}
    text = markdown(results)
    assert "## The papers' orderings\n\nClaims whose methods and metrics are here: 1 holds." in text
    assert "| 77.18 > 73.3 | +10.00 ± 0.00 | holds |" in text


def test_the_plot_needs_a_finished_method(tmp_path):
    results = example_results()
    path = save_plot(results, tmp_path)
    assert path is not None
    assert path.name == "few_shot_5way_5shot_acc.png"
    results["rows"] = [row for row in results["rows"] if row["is_baseline"]]
    assert save_plot(results, tmp_path) is None
