"""What the papers claim about which method has more of what, and whether a comparison agrees.

A claim is an ordering of two methods in one metric. It is judged by the 95 % interval of the difference over seeds,
paired where both have the same seeds: the claim holds where the interval lies on its side of zero, is reversed where
it lies on the other, and is not separated where it holds zero. Each claim is judged by itself: between equal methods
about one claim in twenty would seem to hold or to be reversed.

Sources: Zhao et al., ICLR 2021 (Exemplar); Sun et al., AAAI 2022 (CAMtrast); Wang et al., CVPR 2022 (SL-MLP), of whose
text only the abstract was at hand. What these papers say across data sets or numbers of classes (cross-domain tables,
"below 32 classes SimSiam overtakes") needs several comparisons and is not listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rayjobs.significance import Difference, difference

__all__ = [
    "HEADINGS",
    "LEGEND",
    "ORDERINGS",
    "Judged",
    "Ordering",
    "Samples",
    "judge",
    "judge_all",
    "orderings_markdown",
    "orderings_rows",
    "orderings_summary",
    "samples_of",
]

Samples = Mapping[str, Mapping[str, Mapping[int, float]]]  # metric -> method -> seed -> value
Verdict = Literal["holds", "reversed", "not separated", "one seed"]


@dataclass(frozen=True)
class Ordering:
    """One claim.

    Attributes:
        claim: in words.
        source: paper and table or figure.
        metric: what is larger.
        larger: the method that has more of it by the claim.
        smaller: the one that has less.
        published: the paper's two numbers, that of ``larger`` first; empty where it prints none.
        note: what is not the paper's own: an extension, a formula from general knowledge.
    """

    claim: str
    source: str
    metric: str
    larger: str
    smaller: str
    published: tuple[float, float] | tuple[()] = ()
    note: str = ""


@dataclass(frozen=True)
class Judged:
    """A claim beside what was measured."""

    ordering: Ordering
    found: Difference
    verdict: Verdict


ONE, FIVE = "few_shot/5way_1shot_acc", "few_shot/5way_5shot_acc"
LINEAR, ENTROPY, RAW = "linear/top1", "entropy/h_r", "uniformity/raw"
ZHAO4, ZHAO10 = "Zhao Table 4 (miniImageNet, ResNet-18)", "Zhao Table 10 (ImageNet linear)"
SUN3, SUN5 = "Sun Table 3 (miniImageNet)", "Sun Table 5 (16 classes, 4,800 images)"
SUN3_TIERED, SUN_FIG3 = "Sun Table 3 (tieredImageNet)", "Sun Figure 3"
WANG = "Wang, abstract"
BASE_NOTE = "the paper's base-class accuracy, here linear top-1"
RECALLED = "the direction is the abstract's, the formula ours"
BY_EXTENSION = "the figure shows SimSiam as the unsupervised method"
QUALITATIVE = "Figure 2 shows maps only; the number is ours"

ORDERINGS: tuple[Ordering, ...] = (
    # Zhao et al.: few-shot on novel classes and on base classes
    Ordering("Exemplar v2 beats MoCo v2, 1-shot", ZHAO4, ONE, "exemplar_v2", "moco_v2", (55.33, 52.14)),
    Ordering("Exemplar v2 beats MoCo v2, 5-shot", ZHAO4, FIVE, "exemplar_v2", "moco_v2", (77.18, 73.30)),
    Ordering("Exemplar v2 beats Supervised, 1-shot", ZHAO4, ONE, "exemplar_v2", "supervised", (55.33, 54.60)),
    Ordering("Exemplar v2 beats Supervised, 5-shot", ZHAO4, FIVE, "exemplar_v2", "supervised", (77.18, 74.50)),
    Ordering("Supervised beats MoCo v2, 1-shot", ZHAO4, ONE, "supervised", "moco_v2", (54.60, 52.14)),
    Ordering("Supervised beats MoCo v2, 5-shot", ZHAO4, FIVE, "supervised", "moco_v2", (74.50, 73.30)),
    Ordering(
        "Supervised beats MoCo v2 on base classes", ZHAO4, LINEAR, "supervised", "moco_v2", (83.6, 75.3), BASE_NOTE
    ),
    Ordering(
        "Supervised beats Exemplar v2 on base classes",
        ZHAO4,
        LINEAR,
        "supervised",
        "exemplar_v2",
        (83.6, 79.9),
        BASE_NOTE,
    ),
    Ordering(
        "Exemplar v2 beats MoCo v2 on base classes", ZHAO4, LINEAR, "exemplar_v2", "moco_v2", (79.9, 75.3), BASE_NOTE
    ),
    Ordering("Exemplar v1 beats MoCo v1, linear", ZHAO10, LINEAR, "exemplar_v1", "moco_v1", (64.6, 60.8)),
    Ordering("MoCo v2 beats MoCo v1, linear", ZHAO10, LINEAR, "moco_v2", "moco_v1", (67.5, 60.8)),
    # Sun et al.: standard few-shot
    Ordering(
        "CAMtrast (SimSiam) beats Supervised, 1-shot", SUN3, ONE, "camtrast_simsiam", "supervised", (58.42, 55.31)
    ),
    Ordering(
        "CAMtrast (SimSiam) beats Supervised, 5-shot", SUN3, FIVE, "camtrast_simsiam", "supervised", (74.68, 73.73)
    ),
    Ordering("CAMtrast (SimSiam) beats SimSiam, 1-shot", SUN3, ONE, "camtrast_simsiam", "simsiam", (58.42, 48.81)),
    Ordering("CAMtrast (SimSiam) beats SimSiam, 5-shot", SUN3, FIVE, "camtrast_simsiam", "simsiam", (74.68, 69.27)),
    Ordering("CAMtrast (MoCo v2) beats MoCo v2, 1-shot", SUN3, ONE, "camtrast_moco", "moco_v2", (54.14, 52.04)),
    Ordering("CAMtrast (MoCo v2) beats MoCo v2, 5-shot", SUN3, FIVE, "camtrast_moco", "moco_v2", (74.02, 73.56)),
    Ordering(
        "CAMtrast (MoCo v2) beats Supervised, 5-shot", SUN3_TIERED, FIVE, "camtrast_moco", "supervised", (80.04, 78.90)
    ),
    Ordering("Supervised beats SimSiam, 1-shot", SUN3, ONE, "supervised", "simsiam", (55.31, 48.81)),
    Ordering("Supervised beats SimSiam, 5-shot", SUN3, FIVE, "supervised", "simsiam", (73.73, 69.27)),
    Ordering("MoCo v2 beats BYOL, 5-shot", SUN3, FIVE, "moco_v2", "byol", (73.56, 61.42)),
    # Sun et al.: what each part of CAMtrast adds
    Ordering("CAM only beats Supervised, 5-shot", SUN5, FIVE, "camtrast_cam_only", "supervised", (47.85, 45.30)),
    Ordering(
        "Contrast only (SimSiam) beats CAM only, 5-shot",
        SUN5,
        FIVE,
        "camtrast_contrast_only_simsiam",
        "camtrast_cam_only",
        (49.99, 47.85),
    ),
    Ordering(
        "CAMtrast (SimSiam) beats Contrast only (SimSiam), 5-shot",
        SUN5,
        FIVE,
        "camtrast_simsiam",
        "camtrast_contrast_only_simsiam",
        (54.22, 49.99),
    ),
    # Sun et al.: geometry
    Ordering("SimSiam has a higher H_R than Supervised", SUN_FIG3, ENTROPY, "simsiam", "supervised"),
    Ordering("SimSiam has a higher raw U than Supervised", SUN_FIG3, RAW, "simsiam", "supervised"),
    Ordering("MoCo v2 has a higher H_R than Supervised", SUN_FIG3, ENTROPY, "moco_v2", "supervised", (), BY_EXTENSION),
    Ordering("MoCo v2 has a higher raw U than Supervised", SUN_FIG3, RAW, "moco_v2", "supervised", (), BY_EXTENSION),
    Ordering(
        "CAMtrast (SimSiam) has a higher H_R than Supervised",
        SUN5,
        ENTROPY,
        "camtrast_simsiam",
        "supervised",
        (4.47, 3.56),
    ),
    Ordering(
        "CAMtrast (SimSiam) has a higher raw U than Supervised",
        SUN5,
        RAW,
        "camtrast_simsiam",
        "supervised",
        (14.37, 7.49),
    ),
    Ordering(
        "CAMtrast (SimSiam) has larger maps than Supervised",
        "Sun Figure 2",
        "cam/area",
        "camtrast_simsiam",
        "supervised",
        (),
        QUALITATIVE,
    ),
    # Wang et al.: SL-MLP
    Ordering(
        "SL-MLP beats Supervised on unseen classes, linear (+7.2)",
        WANG,
        "concept_generalization/top1",
        "sl_mlp",
        "supervised",
    ),
    Ordering(
        "SL-MLP beats Supervised on unseen classes, 5-shot",
        WANG,
        FIVE,
        "sl_mlp",
        "supervised",
        (),
        "concept generalization in the paper, here few-shot",
    ),
    Ordering(
        "Supervised has a higher discriminative ratio than SL-MLP",
        WANG,
        "class_geometry/discriminative_ratio",
        "supervised",
        "sl_mlp",
        (),
        RECALLED,
    ),
    Ordering(
        "SL-MLP mixes old and new classes more than Supervised",
        WANG,
        "class_geometry/mixtureness",
        "sl_mlp",
        "supervised",
        (),
        RECALLED,
    ),
    Ordering(
        "Supervised has more redundant features than SL-MLP",
        WANG,
        "class_geometry/redundancy",
        "supervised",
        "sl_mlp",
        (),
        RECALLED,
    ),
)


def samples_of(runs: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, dict[int, float]]]:
    """The finished runs' metrics as ``Samples``; runs as ``comparison.json`` holds them."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in runs:
        if run["outcome"] != "finished":
            continue
        for name, metric in run["metrics"].items():
            if math.isfinite(metric["value"]):
                found.setdefault(name, {}).setdefault(run["label"], {})[run["seed"]] = metric["value"]
    return found


def judge(ordering: Ordering, samples: Samples) -> Judged | None:
    """A claim beside the measured difference; None where a method or the metric is missing."""
    values = samples.get(ordering.metric, {})
    larger, smaller = values.get(ordering.larger), values.get(ordering.smaller)
    if not larger or not smaller:
        return None
    found = difference(larger, smaller)
    if found.half is None:
        return Judged(ordering, found, "one seed")
    if found.mean > found.half:
        return Judged(ordering, found, "holds")
    return Judged(ordering, found, "reversed" if found.mean < -found.half else "not separated")


def judge_all(samples: Samples, orderings: Sequence[Ordering] = ORDERINGS) -> list[Judged]:
    """Every claim whose two methods and metric were measured."""
    return [judged for ordering in orderings if (judged := judge(ordering, samples)) is not None]


def orderings_rows(judged: Sequence[Judged]) -> list[tuple[str, ...]]:
    """(claim, source, published, measured difference, verdict), as text."""
    rows = []
    for item in judged:
        ordering, found = item.ordering, item.found
        published = " > ".join(f"{value:g}" for value in ordering.published)
        interval = "" if found.half is None else f" ± {found.half:.2f}"
        kind = " (seeds differ)" if found.kind == "welch" else ""
        claim = f"{ordering.claim} ({ordering.note})" if ordering.note else ordering.claim
        rows.append((claim, ordering.source, published, f"{found.mean:+.2f}{interval}{kind}", item.verdict))
    return rows


HEADINGS = ("claim", "source", "published", "measured difference", "verdict")
LEGEND = (
    "Measured difference: of the means over seeds, the claimed larger minus the claimed smaller, ± half width of the "
    "95 % t-interval, paired by seed where both methods have the same seeds. holds / reversed: the interval lies "
    "wholly above / below zero; not separated: it holds zero. Each claim is judged by itself, without a correction for "
    "their number. The papers' numbers come from other data at another scale."
)


def orderings_markdown(judged: Sequence[Judged]) -> str:
    """The claims as a Markdown table with its legend; empty without claims."""
    if not judged:
        return ""
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|---|---:|---:|---|"]
    lines += ["| " + " | ".join(row) + " |" for row in orderings_rows(judged)]
    return f"{orderings_summary(judged)}\n\n" + "\n".join(lines) + f"\n\n{LEGEND}"


def orderings_summary(judged: Sequence[Judged]) -> str:
    """How many claims got which verdict."""
    verdicts = [item.verdict for item in judged]
    counts = [f"{verdicts.count(v)} {v}" for v in ("holds", "reversed", "not separated", "one seed") if v in verdicts]
    return f"Claims whose methods and metrics are here: {', '.join(counts)}."
