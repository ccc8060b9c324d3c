"""What a feature map knows of its image: pictures that have the same features, and how far they are from the original.

Feature inversion of Zhao et al. (ICLR 2021, section 2.3, Figures 5 and 6, appendix F): the last feature map of the
frozen backbone is inverted with a deep image prior (``deep_image_prior``: network, optimiser and differences to the
reference). The paper inverts one random image per class of ImageNet's validation set and reports the mean LPIPS
distance to the original, MoCo against supervised; it gives 5.59 and 6.43, ten times the usual range of LPIPS, so only
the order and the ratio (0.87) of two models can be set against it.

Distances of a reconstruction: the error of the features (what was minimised; in the backbone's own units, so also
relative to the variance of the map), PSNR and SSIM of the colours, and LPIPS where its weights are given.

The same images, noise and first weights are used for all models: they follow from the seed and the rows alone.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from evaluation.deep_image_prior import Inversion, invert_images
from evaluation.inversion_comparison import compare
from evaluation.inversion_figures import PictureRow, loss_figure, picture_grid
from evaluation.metric import (
    Artifact,
    ClassCounts,
    EvaluationContext,
    Metric,
    Output,
    Phase,
    Samples,
    get_features,
    mean_interval,
)
from evaluation.perceptual_distance import (
    LINEAR_SOURCE,
    LPIPS_MIN_SIDE,
    SSIM_MIN_SIDE,
    TRUNK_SOURCE,
    Lpips,
    find_lpips_linear,
    load_lpips,
    psnr,
    ssim,
)

__all__ = [
    "InversionConfig",
    "InversionExecutor",
    "check",
    "choose_rows",
    "compare",
    "evaluate",
    "invert_in_groups",
    "metric_names",
    "protocol",
    "splits",
]

logger = logging.getLogger(__name__)

SHOWN = 32  # images in a grid


@dataclass(frozen=True)
class InversionConfig:
    """Feature inversion with a deep image prior.

    Attributes:
        num_images: images, one per class in turn; the paper has one of each of ImageNet's 1000 classes.
        iterations: Adam steps per image.
        learning_rate: of Adam.
        image_size: side of the images in pixels; 0 takes that of the evaluation (224 in the paper).
        images_at_once: images that are fitted together, as groups of one network: fewer and larger operations for a
            GPU, no gain on a CPU. It changes rounding and with it the pictures: keep it the same for models that you
            compare.
        lpips_trunk: file with torchvision's squeezenet1_1 weights; empty leaves LPIPS out, with a warning.
        lpips_linear: file squeeze.pth, version 0.1, of the package lpips; empty takes that of the installed package.
    """

    num_images: int = 16
    iterations: int = 3000
    learning_rate: float = 0.001
    image_size: int = 0
    images_at_once: int = 1
    lpips_trunk: str = ""
    lpips_linear: str = ""


class InversionExecutor(Protocol):
    """Inverts images somewhere else, for example on the nodes of a cluster: ``context.info["inversion_executor"]``."""

    def __call__(
        self, images: np.ndarray, rows: Sequence[int], config: InversionConfig, seed: int
    ) -> Iterator[tuple[int, Inversion]]:
        """Position in ``images`` and result of every image once, in any order, each as soon as it is there.

        Args:
            images: uint8 (n, 3, S, S), RGB.
            rows: n row numbers of the images, which decide noise and first weights.
            config: iterations, learning rate and images at once; the first group is the first images, and so on.
            seed: of noise and first weights.
        """
        ...


def metric_names(config: InversionConfig) -> tuple[str, ...]:
    """Names of the main metrics; ``inversion/relative_feature_mse`` is yielded too where the maps are not constant."""
    names = ("inversion/feature_mse", "inversion/psnr", "inversion/ssim")
    return ("inversion/lpips", *names) if config.lpips_trunk else names


def splits(config: InversionConfig, phase: Phase) -> tuple[str, ...]:
    """Splits that the evaluation reads."""
    return (phase,)


def protocol(config: InversionConfig, phase: Phase) -> dict:
    """Everything needed to reproduce the numbers, as JSON data."""
    return {
        "name": "inversion of the last feature map with a deep image prior",
        "source": "Zhao et al., ICLR 2021, section 2.3; nanxuanzhao/Good_transfer: code_reconstruction_DIP",
        "phase": phase,
        "split": phase,
        "images": f"{config.num_images} (all where there are fewer), one per class in turn, drawn from the seed",
        "features": "last feature map of the frozen backbone in eval mode, of the evaluation view",
        "network": (
            "skip decoder of up to 6 scales, widths 16-32-64-128-128-128, kernels 7-7-5-5-3-3, 4 skip channels, "
            "average pool down, nearest up, BatchNorm on the statistics of the one image, LeakyReLU(0.2), no sigmoid; "
            "input uniform noise in [0, 0.1], 32 channels, fixed; scales as many as leave 2 px of the image, side the "
            "next multiple of 2^scales (224 px: 6 scales, 256 px), the image its top left corner"
        ),
        "optimisation": (
            f"Adam, learning rate {config.learning_rate:g}, {config.iterations} steps on the mean squared error of the "
            f"features; {config.images_at_once} image(s) at once; noise and first weights from (seed, row)"
        ),
        "metric": (
            "means over images: feature_mse of the unclamped output after the last step; relative_feature_mse = that "
            "over the variance of the map; psnr (dB, at most 100) and ssim (11 px Gaussian window) of the picture, "
            "clamped and rounded to 8 bits; lpips version 0.1 with SqueezeNet 1.1 on colours in [-1, 1], not resized"
            + ("" if config.lpips_trunk else " (not computed: no weights given)")
        ),
        "interval": "mean +- 1.96 s / sqrt(n), s with ddof = 1: spread over images, not over pretraining seeds",
        "config": asdict(config),
    }


def check(config: InversionConfig, phase: Phase, class_counts: ClassCounts) -> None:
    """ValueError where the options or the data do not allow the evaluation; call it before any long work."""
    if min(config.num_images, config.iterations, config.images_at_once) < 1 or not 0 < config.learning_rate < np.inf:
        raise ValueError(
            f"inversion got num_images={config.num_images}, iterations={config.iterations}, images_at_once="
            f"{config.images_at_once}, learning_rate={config.learning_rate}; allowed: the first three at least 1, the "
            "learning rate positive (the paper uses 3000 iterations with 0.001)."
        )
    if config.image_size:
        _check_side(config, config.image_size)
    if config.lpips_linear and not config.lpips_trunk:
        raise ValueError(
            f"inversion got lpips_linear={config.lpips_linear} without lpips_trunk; LPIPS needs both. "
            f"Give lpips_trunk, the path of {TRUNK_SOURCE}, or leave both out."
        )
    if config.lpips_trunk:
        _check_files(config)
    if sum(class_counts.get(phase, ())) == 0:
        present = ", ".join(name for name in class_counts if sum(class_counts[name])) or "none"
        raise ValueError(
            f"inversion needs images in split {phase!r}; the data has: {present}. Name the split in the data URIs "
            f"({phase}=...) or let the seeded split rule make it."
        )


def _check_side(config: InversionConfig, side: int) -> None:
    smallest = LPIPS_MIN_SIDE if config.lpips_trunk else SSIM_MIN_SIDE
    if side < smallest:
        raise ValueError(
            f"inversion got images of {side} px; its distances need at least {smallest} px. Raise image_size."
        )


def _check_files(config: InversionConfig) -> None:
    linear = config.lpips_linear or find_lpips_linear()
    if not linear:
        raise ValueError(f"inversion got lpips_trunk without lpips_linear. Give the path of {LINEAR_SOURCE}.")
    for option, path, source in (
        ("lpips_trunk", config.lpips_trunk, TRUNK_SOURCE),
        ("lpips_linear", linear, LINEAR_SOURCE),
    ):
        if not Path(path).expanduser().is_file():
            raise ValueError(f"inversion: {option}={path} is not a file. Give the path of {source}.")


def evaluate(config: InversionConfig, context: EvaluationContext) -> Iterator[Output]:
    """Yield mean distances with intervals, the distances of every image, the pictures, a grid and the loss curves.

    The images are inverted in this process, or by ``context.info["inversion_executor"]``. Lines of progress go to
    ``context.info["on_progress"]``, else to the log. When interrupted, a grid of what was finished is yielded before
    the interruption goes on.
    """
    features = get_features(context, context.phase)
    check(config, context.phase, {context.phase: features.class_counts})
    if context.images is None:
        raise ValueError("inversion needs the images of a checkpoint's evaluation; this context has features only.")
    lpips = _lpips(config)
    rows = choose_rows(features.labels, config.num_images, context.seed)
    if len(rows) < config.num_images:
        message = f"inversion: num_images={config.num_images} exceeds the {len(rows):,} images of {context.phase!r}"
        warnings.warn(f"{message}; all of them are inverted", RuntimeWarning, stacklevel=2)
    images = context.images(context.phase, rows, config.image_size)
    _check_side(config, images.shape[-1])
    names = [features.class_names[features.labels[row]] for row in rows]
    found: dict[int, Inversion] = {}
    try:
        for position, result in _executor(context)(images, rows, config, context.seed):
            found[position] = result
    except KeyboardInterrupt:
        done = sorted(found)
        if done:
            pictures = np.stack([found[i].reconstruction for i in done])
            grid = _grid(images[done], pictures, [names[i] for i in done], "interrupted", psnr(images[done], pictures))
            yield Artifact("inversion/partial.png", grid)
        raise
    results = [found[i] for i in range(len(rows))]
    yield from _outputs(images, results, rows, names, _title(config, context, images.shape[-1]), lpips)


def choose_rows(labels: np.ndarray, num_images: int, seed: int) -> list[int]:
    """Rows of a split: one random image per class in turn, classes in random order; fewer images are a prefix.

    Args:
        labels: (N,).
        num_images: rows to choose; all rows where there are fewer.
        seed: of the order.
    """
    rng = np.random.default_rng(np.random.SeedSequence([seed, len(labels)]))
    order = rng.permutation(len(labels))
    classes = rng.permutation(np.unique(labels))
    by_class = [order[labels[order] == label] for label in classes]
    turns = max(map(len, by_class))
    rows = [int(members[turn]) for turn in range(turns) for members in by_class if turn < len(members)]
    return rows[:num_images]


def invert_in_groups(
    backbone: Any,
    images: np.ndarray,
    rows: Sequence[int],
    config: InversionConfig,
    seed: int,
    on_progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Inversion]]:
    """Invert images in this process, ``images_at_once`` of them together; arguments as of ``InversionExecutor``.

    Args:
        backbone: on the device where the work is done.
        images: uint8 (n, 3, S, S), RGB.
        rows: n row numbers.
        config: the settings.
        seed: of noise and first weights.
        on_progress: gets a line for every tenth of the iterations.
    """
    for start in range(0, len(rows), config.images_at_once):
        chosen = slice(start, start + config.images_at_once)
        found = invert_images(
            backbone,
            images[chosen],
            rows[chosen],
            iterations=config.iterations,
            learning_rate=config.learning_rate,
            seed=seed,
            on_step=_reporter(on_progress, start, len(rows), config) if on_progress else None,
        )
        for i, result in enumerate(found):
            yield start + i, result


def _reporter(
    say: Callable[[str], None], start: int, num_images: int, config: InversionConfig
) -> Callable[[int, float], None]:
    """Callback of the optimisation that says one line per tenth of the iterations."""
    last = min(start + config.images_at_once, num_images)
    which = f"image {last}" if last == start + 1 else f"images {start + 1} to {last}"
    said = -1

    def report(step: int, loss: float) -> None:
        nonlocal said
        tenth = 10 * step // config.iterations
        if tenth > said:
            said = tenth
            say(f"inversion: {which} of {num_images}, iteration {step} of {config.iterations}, feature loss {loss:.4g}")

    return report


def _executor(context: EvaluationContext) -> InversionExecutor:
    """What inverts the images: the context's own way, else this process."""
    given = context.info.get("inversion_executor")
    if given is not None:
        return given
    backbone = context.backbone
    if backbone is None:
        raise ValueError("inversion needs the backbone; this context has features only. Evaluate a checkpoint.")
    say = context.info.get("on_progress", logger.info)
    return lambda images, rows, config, seed: invert_in_groups(backbone, images, rows, config, seed, say)


def _lpips(config: InversionConfig) -> Lpips | None:
    """The distance, before any long work; None with a warning that says how to get it."""
    if config.lpips_trunk:
        return load_lpips(config.lpips_trunk, config.lpips_linear or find_lpips_linear())
    installed = " (found: the installed package's is used)" if find_lpips_linear() else ""
    warnings.warn(
        "inversion: the LPIPS distance is left out, because its weights were not given. Set lpips_trunk to the path "
        f"of {TRUNK_SOURCE} and lpips_linear to that of {LINEAR_SOURCE}{installed}. The other distances are computed.",
        RuntimeWarning,
        stacklevel=3,
    )
    return None


def _outputs(
    images: np.ndarray,
    results: Sequence[Inversion],
    rows: Sequence[int],
    names: Sequence[str],
    title: str,
    lpips: Lpips | None,
) -> Iterator[Output]:
    """Everything that is yielded of finished inversions."""
    pictures = np.stack([result.reconstruction for result in results])
    values = {} if lpips is None else {"lpips": lpips.distances(images, pictures)}
    values["feature_mse"] = np.array([result.feature_mse for result in results])
    values["psnr"], values["ssim"] = psnr(images, pictures), ssim(images, pictures)
    variances = np.array([result.feature_variance for result in results])
    if (variances > 0).all():
        values["relative_feature_mse"] = values["feature_mse"] / variances
    else:
        warnings.warn(
            f"inversion: the feature map of {(variances == 0).sum()} of {len(rows)} images is constant (a collapsed "
            "backbone); there is nothing to invert, and inversion/relative_feature_mse is left out",
            RuntimeWarning,
            stacklevel=3,
        )
    for name, per_image in values.items():
        mean, ci95 = mean_interval(per_image) if len(rows) > 1 else (float(per_image[0]), None)
        yield Metric(f"inversion/{name}", mean, ci95, len(rows))
        yield Samples(f"inversion/{name}", per_image)
    yield Samples("inversion/rows", np.array(rows))
    yield Samples("inversion/class_names", np.array(names))
    yield Samples("inversion/images", images)
    yield Samples("inversion/reconstructions", pictures)
    losses = np.stack([result.losses for result in results])
    yield Samples("inversion/losses", losses)
    yield Artifact("inversion/grid.png", _grid(images, pictures, names, title, values["psnr"]))
    yield Artifact("inversion/loss.png", loss_figure(results[0].steps, losses, title))


def _grid(images: np.ndarray, pictures: np.ndarray, names: Sequence[str], title: str, decibels: np.ndarray) -> bytes:
    """Originals above their reconstructions."""
    more = f" (first {SHOWN} of {len(images)} images)" if len(images) > SHOWN else ""
    rows = [
        PictureRow("original", images[:SHOWN]),
        PictureRow("from features", pictures[:SHOWN], [f"PSNR {value:.1f} dB" for value in decibels[:SHOWN]]),
    ]
    return picture_grid(rows, names[:SHOWN], title + more)


def _title(config: InversionConfig, context: EvaluationContext, side: int) -> str:
    method = str(context.info.get("method", "")).replace("_", " ")
    parts = ["Feature inversion", method, f"{side} px", f"{config.iterations} iterations"]
    return ", ".join(part for part in parts if part)
