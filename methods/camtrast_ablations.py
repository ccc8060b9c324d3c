"""The ablations of CAMtrast (Sun et al., AAAI 2022, Table 5): its terms taken apart.

    CAM only:       L = CE(W f(x), y) + CE(W f(x'), y)
    Contrast only:  L = CE(W f(x), y) + L_self(x, x'), with MoCo v2 or SimSiam

Everything else is as in ``camtrast.py``: x' = (1 - M_y(x)) * x, the warm-up on CE(x) alone, views and optimiser. The
baseline of the table, CE(x), is ``supervised``.

Reading: Table 5 does not say what the second view of "contrast only" is. Taken literally it is the suppressed image x',
the default; ``second_view="augmented"`` takes a second augmentation of the image, so that no CAM is in the loss (two
view recipes are needed then: ``--views light light``). The warm-up stays, so that only the second view differs;
``cam_warmup_epochs=0`` drops it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.camtrast import CamtrastMoCo, CamtrastMoCoConfig, SimSiamPartConfig, simsiam_term
from methods.camtrast_parts import (
    CamtrastConfig,
    Original,
    classify_original,
    classify_suppressed,
    is_warmup,
    one_view,
    summed,
    suppressed_images,
    take_views,
    validate_camtrast,
)
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.moco import validate_momentum_contrast
from methods.simsiam import build_heads, validate_heads

__all__ = [
    "CamtrastCAMOnly",
    "CamtrastCAMOnlyConfig",
    "CamtrastContrastOnlyMoCo",
    "CamtrastContrastOnlyMoCoConfig",
    "CamtrastContrastOnlySimSiam",
    "CamtrastContrastOnlySimSiamConfig",
    "SecondView",
]

SecondView = Literal["suppressed", "augmented"]


def _num_views(config: Any) -> range:
    return range(2, 3) if config.second_view == "augmented" else range(1, 2)


@dataclass(frozen=True)
class CamtrastCAMOnlyConfig(CamtrastConfig):
    """Cross entropy of the image and of the suppressed image.

    Attributes:
        sync_batchnorm: BatchNorm over the batches of all workers; off as in ``supervised``.
    """

    sync_batchnorm: bool = False


@dataclass(frozen=True)
class CamtrastContrastOnlyMoCoConfig(CamtrastMoCoConfig):
    """Cross entropy of the image, and MoCo v2 between it and a second view.

    Attributes:
        second_view: suppressed (the image with its class activation hidden) or augmented (a second augmentation: name
            two view recipes, --views light light).
    """

    second_view: SecondView = "suppressed"


@dataclass(frozen=True)
class CamtrastContrastOnlySimSiamConfig(SimSiamPartConfig):
    """Cross entropy of the image, and SimSiam between it and a second view.

    Attributes:
        second_view: suppressed (the image with its class activation hidden) or augmented (a second augmentation: name
            two view recipes, --views light light).
    """

    second_view: SecondView = "suppressed"


class CamtrastCAMOnly(nn.Module):
    """The image and its suppressed copy are classified alike."""

    fixed_learning_rate: tuple[str, ...] = ()

    @staticmethod
    def validate(config: CamtrastCAMOnlyConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_camtrast(config, context, "camtrast_cam_only")

    def __init__(self, config: CamtrastCAMOnlyConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, context.num_classes)
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """CE(x) during the warm-up, then CE(x) + CE(x')."""
        x = one_view(batch, "camtrast_cam_only")
        original = classify_original(self, x, batch.labels)
        if is_warmup(self.config, progress):
            return original.term
        x_suppressed, monitors = suppressed_images(self, x, original.features_BChw, batch.labels)
        suppressed, _ = classify_suppressed(self, x_suppressed, batch.labels)
        return summed(original.term, suppressed, monitors=monitors)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""


def _validate_second_view(config: Any, context: MethodContext, method: str) -> None:
    if config.second_view not in get_args(SecondView):
        raise ValueError(f"second_view={config.second_view!r} must be one of: {', '.join(get_args(SecondView))}.")
    if config.second_view == "suppressed":
        validate_camtrast(config, context, method)
        return
    validate_camtrast(config, replace(context, feature_map_side=0), method)  # no CAM is computed
    if config.suppress_to != "mean_color":
        warnings.warn(
            f"{method}: suppress_to has no effect with second_view='augmented', which hides nothing. Leave it out, or "
            "use second_view='suppressed'.",
            stacklevel=3,
        )


def _views(config: Any, batch: Batch, method: str) -> list[Tensor]:
    """x alone, or x and its second augmentation."""
    if config.second_view == "suppressed":
        return [one_view(batch, f"{method} with second_view='suppressed'")]
    return take_views(batch, 2, f"{method} with second_view='augmented' contrasts two augmentations of an image")


def _second_view(
    method: Any, views: list[Tensor], original: Original, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The second view, and monitors of the mask where it has one."""
    if method.config.second_view == "augmented":
        return views[1], {}
    return suppressed_images(method, views[0], original.features_BChw, labels)


class CamtrastContrastOnlyMoCo(CamtrastMoCo):
    """``CamtrastMoCo`` without CE(x'): the online network never sees the second view."""

    config: CamtrastContrastOnlyMoCoConfig

    @staticmethod
    def num_views(config: CamtrastContrastOnlyMoCoConfig) -> range:
        """Two with an augmented second view, else one."""
        return _num_views(config)

    @staticmethod
    def validate(config: CamtrastContrastOnlyMoCoConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        _validate_second_view(config, context, "camtrast_contrast_only_moco")
        validate_momentum_contrast(config, context, "camtrast_contrast_only_moco")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """CE(x) during the warm-up, then CE(x) + InfoNCE(x, second view)."""
        views = _views(self.config, batch, "camtrast_contrast_only_moco")
        self.follow(progress)
        original = classify_original(self, views[0], batch.labels)
        if is_warmup(self.config, progress):
            return original.term
        x_second, monitors = _second_view(self, views, original, batch.labels)
        contrasted = self.contrast_term(original.pooled_BC, x_second, batch, progress)
        return summed(original.term, contrasted, monitors=monitors)


class CamtrastContrastOnlySimSiam(nn.Module):
    """The prediction from the second view approaches the projection of the image; only the image is classified."""

    # During the warm-up projector and predictor take no part in the loss.
    has_unused_parameters = True

    @staticmethod
    def num_views(config: CamtrastContrastOnlySimSiamConfig) -> range:
        """Two with an augmented second view, else one."""
        return _num_views(config)

    @staticmethod
    def validate(config: CamtrastContrastOnlySimSiamConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        _validate_second_view(config, context, "camtrast_contrast_only_simsiam")
        validate_heads(config, context, "camtrast_contrast_only_simsiam")

    def __init__(self, config: CamtrastContrastOnlySimSiamConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, context.num_classes)
        self.projector, self.predictor = build_heads(config, backbone.num_features)
        self.fixed_learning_rate: tuple[str, ...] = ("predictor.",) if config.fixed_predictor_learning_rate else ()
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """CE(x) during the warm-up, then CE(x) - cos(sg(z), g(z')), z' of the second view."""
        views = _views(self.config, batch, "camtrast_contrast_only_simsiam")
        original = classify_original(self, views[0], batch.labels)
        if is_warmup(self.config, progress):
            return original.term
        x_second, monitors = _second_view(self, views, original, batch.labels)
        attracted = simsiam_term(self, original.pooled_BC, self.backbone(x_second))
        return summed(original.term, attracted, monitors=monitors)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
