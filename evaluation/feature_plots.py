"""Maps of frozen features in two dimensions: held-out images of pretraining classes beside classes never seen.

t-SNE (van der Maaten & Hinton, JMLR 2008; scikit-learn) and UMAP (McInnes et al., 2018; umap-learn) of L2-normalised
features, one map of both kinds of classes together. Neither keeps distances between groups, so the map is for looking;
the number beside it, ``feature_plots/silhouette``, is of the features themselves: the mean over images of unseen
classes of (b - a) / max(a, b), a the mean distance to the own class and b to the nearest other class (Rousseeuw 1987;
scikit-learn), from -1 to 1.

Classes and images are drawn with the evaluation's seed from the labels alone, so all models show the same images;
comparing models puts their maps side by side in the same colours.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from evaluation.feature_blocks import unit_rows
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Features,
    Metric,
    ModelResult,
    Output,
    Phase,
    Samples,
    get_features,
)

__all__ = [
    "FeaturePlotsConfig",
    "check",
    "compare",
    "embed",
    "evaluate",
    "metric_names",
    "protocol",
    "splits",
    "stratified_rows",
]

SPLITS = {"val": ("val", "val_classes"), "test": ("test", "novel_classes")}
LABELS = {"tsne": "t-SNE", "umap": "UMAP"}
MAX_CLASSES = 10  # colours of one kind that can still be told apart
MAX_PANELS = 12
HEADINGS = ("classes of pretraining", "unseen classes")
NAME_LENGTH = 20  # characters of a class name in the legend


@dataclass(frozen=True)
class FeaturePlotsConfig:
    """Two-dimensional maps of features.

    Attributes:
        methods: maps to make, "tsne" and "umap"; one plot each.
        max_images: images in the map, half of each kind, the same number of each class where there are enough; also
            the images of the silhouette (at least two per class). The cost grows faster than linearly.
        num_classes: classes of each kind in the map, at most 10; drawn with the seed where there are more.
        perplexity: of t-SNE; a third of the other images where that is less.
        num_neighbors: of UMAP; all other images where they are fewer.
        min_dist: of UMAP, the least distance of points in the map.
    """

    methods: tuple[Literal["tsne", "umap"], ...] = ("tsne",)
    max_images: int = 1000
    num_classes: int = 8
    perplexity: float = 30.0
    num_neighbors: int = 15
    min_dist: float = 0.1


def metric_names(config: FeaturePlotsConfig) -> tuple[str, ...]:
    """Names of the metrics."""
    return ("feature_plots/silhouette",)


def splits(config: FeaturePlotsConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads: base classes first."""
    return SPLITS[phase]


def protocol(config: FeaturePlotsConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers and the maps, as JSON data."""
    base, unseen = SPLITS[phase]
    return {
        "name": "maps of frozen features and silhouette of unseen classes",
        "source": "van der Maaten & Hinton, JMLR 2008; McInnes et al., 2018; Rousseeuw, 1987",
        "phase": phase,
        "split": unseen,
        "base_classes": base,
        "features": "pooled backbone output, one view per image, L2-normalised (a zero vector stays zero)",
        "metric": (
            f"silhouette: scikit-learn's silhouette_score, Euclidean, of at most {config.max_images} images (two per "
            f"class if that is more) of all classes of {unseen}, the same number of each class where there are enough"
        ),
        "maps": {
            "tsne": f"scikit-learn TSNE, perplexity min({config.perplexity:g}, (images - 1) / 3), PCA initialisation",
            "umap": (
                f"umap-learn, min({config.num_neighbors}, images - 1) neighbours, min_dist {config.min_dist:g}, "
                "Euclidean"
            ),
        },
        "images": f"at most {config.max_images} of at most {config.num_classes} classes of each split, from the seed",
        "interval": "none",
        "config": asdict(config),
    }


def check(config: FeaturePlotsConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    unknown = [method for method in config.methods if method not in LABELS]
    if unknown or not config.methods or len(set(config.methods)) != len(config.methods):
        raise ValueError(f"feature_plots methods are {config.methods}; allowed: one or both of 'tsne' and 'umap'.")
    if config.max_images < 8 or not 1 <= config.num_classes <= MAX_CLASSES:
        raise ValueError(
            f"feature_plots got max_images={config.max_images}, num_classes={config.num_classes}; allowed: at least 8 "
            f"images, 1 to {MAX_CLASSES} classes of each kind (more colours cannot be told apart)."
        )
    if not 0 < config.perplexity < float("inf") or config.num_neighbors < 2 or not 0 <= config.min_dist <= 1:
        raise ValueError(
            f"feature_plots got perplexity={config.perplexity}, num_neighbors={config.num_neighbors}, "
            f"min_dist={config.min_dist}; allowed: perplexity positive, at least 2 neighbours, min_dist 0 to 1."
        )
    for split in SPLITS[phase]:
        if sum(class_counts.get(split, ())) == 0:
            found = ", ".join(name for name in class_counts if sum(class_counts[name])) or "none"
            raise ValueError(
                f"feature_plots needs images in split {split!r}; the data has: {found}. Name the split in the data "
                f"URIs ({split}=...) or let the seeded split rules make it."
            )
    unseen = [count for count in class_counts[SPLITS[phase][1]] if count]
    if len(unseen) < 2 or max(unseen) < 2:
        raise ValueError(
            f"feature_plots: split {SPLITS[phase][1]!r} has {len(unseen)} classes, the largest of {max(unseen)} "
            "images; the silhouette needs at least 2 classes, one of them with 2 images."
        )
    if "umap" in config.methods:
        _umap_class()  # before any long work


def evaluate(config: FeaturePlotsConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield the silhouette of the unseen classes, and each map as a plot and as coordinates.

    Samples, one entry per image: ``feature_plots/<method>`` (n, 2), ``feature_plots/classes`` (n, 2) with 0 for base
    and 1 for unseen and the label, ``feature_plots/class_names`` (n,).
    """
    found = [get_features(context, split) for split in SPLITS[context.phase]]
    names = dict(zip(SPLITS[context.phase], (features.class_counts for features in found), strict=True))
    check(config, context.phase, names)
    yield _silhouette(config, context, found[1])
    drawn = [_draw_images(config, features, [context.seed, kind]) for kind, features in enumerate(found)]
    x = np.concatenate(
        [
            unit_rows(features.features[rows], split)
            for features, rows, split in zip(found, drawn, SPLITS[context.phase], strict=True)
        ]
    )
    classes = np.concatenate(
        [np.stack([np.full(len(rows), kind), found[kind].labels[rows]], axis=1) for kind, rows in enumerate(drawn)]
    )
    class_names = np.array([found[kind].class_names[label] for kind, label in classes])
    yield Samples("feature_plots/classes", classes)
    yield Samples("feature_plots/class_names", class_names)
    for method in config.methods:
        positions = embed(x, method, config, context.seed)
        yield Samples(f"feature_plots/{method}", positions)
        title = f"{LABELS[method]} of frozen features" + _of_model(context)
        yield Artifact(f"feature_plots/{method}.png", _figure(title, [_Map("", positions)], classes, class_names))


def _of_model(context: EvaluationContext) -> str:
    method, num_classes = context.info.get("method"), context.info.get("num_classes")
    classes = f", {num_classes} classes" if num_classes else ""
    return f": {method}{classes}" if method else ""


def _silhouette(config: FeaturePlotsConfig, context: EvaluationContext, unseen: Features) -> Metric:
    """Silhouette of all unseen classes on a stratified draw."""
    from sklearn.metrics import silhouette_score

    present = np.unique(unseen.labels)
    cap = max(config.max_images, 2 * len(present))
    rows = stratified_rows(unseen.labels, present, cap, np.random.default_rng([context.seed, 2]))
    x = unit_rows(unseen.features[rows], SPLITS[context.phase][1])
    return Metric("feature_plots/silhouette", float(silhouette_score(x, unseen.labels[rows])), n=len(rows))


def _draw_images(config: FeaturePlotsConfig, features: Features, seed: list[int]) -> np.ndarray:
    """Rows of the map: a draw of classes, then half of the images from them."""
    rng = np.random.default_rng(seed)
    present = np.unique(features.labels)
    chosen = np.sort(rng.permutation(present)[: config.num_classes])
    return stratified_rows(features.labels, chosen, config.max_images // 2, rng)


def stratified_rows(labels: np.ndarray, classes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """At most ``count`` rows, ascending, of the given classes: one of each class in turn until they are used up."""
    order = rng.permutation(len(labels))
    picks = [order[labels[order] == label] for label in classes]
    turns = np.concatenate([np.arange(len(pick)) for pick in picks])
    return np.sort(np.concatenate(picks)[np.argsort(turns, kind="stable")[:count]])


def embed(x: np.ndarray, method: str, config: FeaturePlotsConfig, seed: int) -> np.ndarray:
    """Positions, float32 (N, 2), of features (N, D), the same for the same seed.

    Raises:
        ValueError: fewer than 4 images.
    """
    n = len(x)
    if n < 4:
        raise ValueError(f"feature_plots has {n} images for the map; it needs at least 4. Add images or classes.")
    if method == "umap":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="umap")  # of few images or duplicates; the map is still made
            neighbors = min(config.num_neighbors, n - 1)
            # Spectral initialisation needs more images than a tiny set has.
            start = "spectral" if n > 10 else "random"
            mapper = _umap_class()(
                n_neighbors=neighbors, min_dist=config.min_dist, init=start, random_state=seed, n_jobs=1
            )
            return np.asarray(mapper.fit_transform(x), dtype=np.float32)
    from sklearn.manifold import TSNE

    # A collapsed backbone has no principal directions to start from.
    start = "pca" if min(x.shape) >= 2 and float(np.ptp(x, axis=0).max()) > 0 else "random"
    mapper = TSNE(perplexity=min(config.perplexity, (n - 1) / 3), init=start, random_state=seed)
    return mapper.fit_transform(x).astype(np.float32)


def _umap_class() -> Any:
    try:
        from umap import UMAP
    except ImportError as error:
        raise ValueError(
            "feature_plots with method 'umap' needs umap-learn, which is not installed. Install it with `pip install "
            "umap-learn`, or leave methods at 'tsne'."
        ) from error
    return UMAP


def compare(config: FeaturePlotsConfig, models: Sequence[ModelResult]) -> Iterator[Artifact]:
    """Yield one figure per method with a map of each model, same images and same colours."""
    for method in config.methods:
        shown = [model for model in models if f"feature_plots/{method}" in model.samples]
        if not shown:
            continue
        classes, names = (shown[0].samples[f"feature_plots/{part}"] for part in ("classes", "class_names"))
        same = [
            model
            for model in shown
            if np.array_equal(model.samples["feature_plots/classes"], classes)
            and np.array_equal(model.samples["feature_plots/class_names"], names)
        ]
        left_out = [model.name for model in shown if model not in same]
        if left_out:
            warnings.warn(
                f"feature_plots: {', '.join(left_out)} show other images than {shown[0].name}; maps side by side need "
                "the same data, seed and options, so they are left out",
                RuntimeWarning,
                stacklevel=2,
            )
        if len(same) < 2:
            continue
        maps = [_Map(_panel_title(model), model.samples[f"feature_plots/{method}"]) for model in same[:MAX_PANELS]]
        more = f" (first {MAX_PANELS} of {len(same)} models)" if len(same) > MAX_PANELS else ""
        title = f"{LABELS[method]} of frozen features{more}"
        yield Artifact(f"feature_plots/{method}_models.png", _figure(title, maps, classes, names))


def _panel_title(model: ModelResult) -> str:
    metric = model.metrics.get("feature_plots/silhouette")
    return model.name + (f"\nsilhouette of unseen classes {metric.value:.2f}" if metric else "")


class _Map(NamedTuple):
    title: str
    positions: np.ndarray


def _figure(title: str, maps: Sequence[_Map], classes: np.ndarray, class_names: np.ndarray) -> bytes:
    """PNG of one or more maps with one legend.

    Args:
        title: of the figure.
        maps: one panel each; positions (n, 2).
        classes: kind and label (n, 2).
        class_names: (n,).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(len(maps), 3 if len(maps) != 4 else 2)
    rows = -(-len(maps) // columns)
    side = 6.0 if len(maps) == 1 else 3.8
    figure, axes = plt.subplots(
        rows, columns, figsize=(side * columns + 2.4, side * rows + 0.4), layout="constrained", squeeze=False
    )
    for axis, panel in zip(axes.flat, maps, strict=False):
        _draw_map(axis, panel, classes, class_names, dot=26 if len(maps) == 1 else 14)
    for axis in axes.flat[len(maps) :]:
        axis.set_axis_off()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside right center", frameon=False, fontsize="small", markerscale=1.3, labelspacing=0.4
    )
    for text in legend.get_texts():
        if text.get_text() in HEADINGS:
            text.set(fontweight="bold", position=(-18, 0))
    figure.suptitle(title, fontsize="medium")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140)
    plt.close(figure)
    return buffer.getvalue()


def _draw_map(axis, panel: _Map, classes: np.ndarray, class_names: np.ndarray, dot: float) -> None:
    """Base classes as pale circles below, unseen ones as strong triangles above."""
    from matplotlib import pyplot as plt

    styles = (
        {"palette": "Set3", "marker": "o", "edge": "0.45"},
        {"palette": "tab10", "marker": "^", "edge": "white"},
    )
    for kind, style in enumerate(styles):
        axis.scatter([], [], alpha=0, label=HEADINGS[kind])
        for number, label in enumerate(np.unique(classes[classes[:, 0] == kind, 1])):
            mine = (classes == (kind, label)).all(axis=1)
            axis.scatter(
                *panel.positions[mine].T,
                s=dot * (1 + 0.3 * kind),
                color=[plt.get_cmap(style["palette"])(number % 10)],
                marker=style["marker"],
                edgecolors=style["edge"],
                linewidths=0.4,
                zorder=2 + kind,
                label=_shortened(str(class_names[mine][0])),
            )
    axis.set(xticks=[], yticks=[])
    axis.set_title(panel.title, fontsize="small")
    axis.set_aspect("equal", adjustable="datalim")
    axis.spines[:].set_color("0.7")


def _shortened(name: str) -> str:
    return name if len(name) <= NAME_LENGTH else name[: NAME_LENGTH - 1] + "…"
