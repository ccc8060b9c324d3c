"""The papers' claims: planted differences get the right verdict, and every claim names what exists."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from evaluation import TASKS
from methods import METHODS
from rayjobs.orderings import ORDERINGS, Ordering, judge, judge_all, orderings_markdown, samples_of

SHOT = "few_shot/5way_5shot_acc"
CLAIM = Ordering("A beats B", "a table", SHOT, "a", "b", (77.0, 73.3))


def values(*numbers, first_seed=0):
    return {first_seed + i: float(number) for i, number in enumerate(numbers)}


def test_claims_name_known_methods_and_state_published_numbers_in_their_order():
    for claim in ORDERINGS:
        assert claim.larger in METHODS
        assert claim.smaller in METHODS
        assert claim.larger != claim.smaller
        assert not claim.published or claim.published[0] > claim.published[1], claim.claim
    keys = [(claim.metric, frozenset((claim.larger, claim.smaller)), claim.source) for claim in ORDERINGS]
    assert len(set(keys)) == len(keys), "a claim stands twice, or against itself"


def test_metrics_of_claims_are_those_of_the_tasks():
    """A task that is in the table yields every metric that a claim about it names."""
    for claim in ORDERINGS:
        task = claim.metric.split("/")[0]
        if task in TASKS:
            assert claim.metric in TASKS[task].metrics, claim.claim


@pytest.mark.parametrize(
    ("larger", "smaller", "verdict"),
    [
        (values(80, 81, 82), values(70, 71.5, 72), "holds"),
        (values(70, 71.5, 72), values(80, 81, 82), "reversed"),
        (values(70, 75, 80), values(79, 71, 74), "not separated"),
        (values(80), values(70, 71, 72), "one seed"),
        (values(5, 5), values(5, 5), "not separated"),
    ],
)
def test_verdicts_of_planted_differences(larger, smaller, verdict):
    found = judge(CLAIM, {SHOT: {"a": larger, "b": smaller}})
    assert found is not None
    assert found.verdict == verdict


def test_shared_seeds_are_paired():
    """Seeds that differ by 20 points hide one point of difference from Welch's interval, not from the paired one."""
    a, b = values(50, 60, 70.1), values(49, 59.1, 69)
    paired = judge(CLAIM, {SHOT: {"a": a, "b": b}})
    unpaired = judge(CLAIM, {SHOT: {"a": a, "b": {seed + 10: value for seed, value in b.items()}}})
    assert paired is not None
    assert unpaired is not None
    assert (paired.verdict, unpaired.verdict) == ("holds", "not separated")
    low, high = stats.ttest_rel(list(a.values()), list(b.values())).confidence_interval(0.95)
    half = paired.found.half
    assert (paired.found.mean, half) == (pytest.approx((low + high) / 2), pytest.approx((high - low) / 2))


def test_intervals_cover_the_truth_and_equal_methods_are_rarely_separated():
    rng = np.random.default_rng(0)
    verdicts = []
    for _ in range(400):
        seeds = rng.normal(0, 5, 3)
        a, b = (dict(enumerate(60 + seeds + rng.normal(0, 1, 3))) for _ in "ab")
        found = judge(CLAIM, {SHOT: {"a": a, "b": b}})
        assert found is not None
        verdicts.append(found.verdict)
    assert 0.02 < 1 - verdicts.count("not separated") / 400 < 0.08


def test_only_claims_with_both_methods_and_the_metric_are_judged():
    samples = {
        SHOT: {"exemplar_v2": values(80, 81), "moco_v2": values(70, 71)},
        "knn/top1": {"supervised": values(1, 2)},
    }
    assert [item.ordering.claim for item in judge_all(samples)] == ["Exemplar v2 beats MoCo v2, 5-shot"]
    assert judge_all({}) == []


def test_samples_come_from_finished_runs():
    def run(label, seed, value, outcome="finished"):
        return {"label": label, "seed": seed, "outcome": outcome, "metrics": {SHOT: {"value": value}}}

    runs = [run("a", 0, 1.0), run("a", 1, 2.0), run("b", 0, float("nan")), run("b", 1, 3.0, "crashed")]
    assert samples_of(runs) == {SHOT: {"a": {0: 1.0, 1: 2.0}}}


def test_markdown_states_interval_published_numbers_and_verdict():
    found = judge(CLAIM, {SHOT: {"a": values(80, 81, 82), "b": values(70, 71.5, 72)}})
    assert found is not None
    text = orderings_markdown([found])
    assert "Claims whose methods and metrics are here: 1 holds." in text
    assert f"| A beats B | a table | 77 > 73.3 | +9.83 ± {found.found.half:.2f} | holds |" in text
    assert orderings_markdown([]) == ""
