"""CAMtrast (Sun et al., AAAI 2022), with MoCo v2 or SimSiam as its self-supervised part.

One view x per image. A class activation map (CAM) of x hides what the classifier looks at; x' is what remains:

    x' = (1 - M_y(x)) * x                                                       (Eqs. 3-4)
    L = CE(W f(x), y) + CE(W f(x'), y) + L_self(z, z'), all weights 1           (Eqs. 5-6)
    MoCo v2:  z = p(f(x)) is the query, z' = p_EMA(f_EMA(x')) its key, so the queue holds keys of suppressed images
    SimSiam:  L_self = -cos(sg(z), g(z')), z' = p(f(x')), sg = stop-gradient

W is a linear classifier on the pooled feature, beside the projector p. During the first epochs only CE(W f(x), y) is
trained, because the CAM of an untrained classifier points nowhere.

Readings, where the paper is silent or its released code differs:
- The CAM explains the label (M_c of the paper), not the predicted class (code).
- One joint optimiser step (paper), not CE(x) first and the rest after it (code).
- The CAM is computed from the feature map of the training forward of x: BatchNorm in training mode, as in the code, and
  no second forward, so f updates its running statistics once for x and once for x'. Map and W are detached.
- Eq. 5 has no stop-gradient; SimSiam needs one on z. The second (symmetric) term of the code is not in Eq. 5.
- All that the released code does otherwise is ``variant="code"``, see ``camtrast_code.py``.
- BatchNorm: ShuffleBN as in MoCo for the keys, synchronised BatchNorm as in SimSiam.
- While only the classifier is trained, the momentum encoder already follows f; the queue is not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.camtrast_code import TwoSteps, is_warmup_code
from methods.camtrast_parts import (
    CamtrastConfig,
    classify_original,
    classify_suppressed,
    is_warmup,
    one_view,
    summed,
    suppressed_images,
    validate_camtrast,
)
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head
from methods.losses import contrast
from methods.moco import unit_vectors, validate_momentum_contrast
from methods.momentum_encoder import MomentumEncoder, resolve_bn_splits, shuffled_encode
from methods.monitors import contrast_monitors, feature_monitors
from methods.optimizers import OptimizerConfig
from methods.queue import FeatureQueue
from methods.simsiam import build_heads, negative_cosine, validate_heads

__all__ = [
    "OPTIMIZER",
    "VIEWS",
    "CamtrastMoCo",
    "CamtrastMoCoConfig",
    "CamtrastSimSiam",
    "CamtrastSimSiamConfig",
    "SimSiamPartConfig",
    "Variant",
    "simsiam_term",
]

# The paper drops the heavy contrastive augmentation: x is a crop and a flip.
VIEWS = ("light",)
# "As for unsupervised learning", lr 0.03 (the paper's supplement); the rest as MoCo v2.
OPTIMIZER = OptimizerConfig(
    optimizer="sgd", learning_rate=0.03, weight_decay=1e-4, schedule="cosine", schedule_every="epoch"
)
Variant = Literal["paper", "code"]


@dataclass(frozen=True)
class CamtrastMoCoConfig(CamtrastConfig):
    """CAMtrast with MoCo v2.

    Attributes:
        temperature: tau of InfoNCE.
        queue_size: number of negative keys; a multiple of the global batch (20,480 for tieredImageNet).
        momentum: m of the momentum encoder.
        projector_depth: number of linear layers of the projector; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width.
        projector_dim: width of queries and keys.
        shuffle_bn: encode keys in another BatchNorm grouping than queries.
        bn_splits: BatchNorm groups of one worker's batch; auto gives about 32 images each, at least 2 in the run.
    """

    temperature: float = 0.2
    queue_size: int = 2048
    momentum: float = 0.999
    projector_depth: int = 2
    projector_hidden_dim: int | None = None
    projector_dim: int = 128
    shuffle_bn: bool = True
    bn_splits: int | Literal["auto"] = "auto"


@dataclass(frozen=True)
class SimSiamPartConfig(CamtrastConfig):
    """Heads and switches of SimSiam in CAMtrast.

    Attributes:
        projector_depth: number of linear layers of the projector; 0 = none.
        projector_hidden_dim: width between its layers; None takes the backbone's feature width.
        projector_dim: width of z.
        predictor_hidden_dim: width of the predictor's bottleneck.
        fixed_predictor_learning_rate: keep the predictor at the peak learning rate, as SimSiam does.
        sync_batchnorm: BatchNorm over the batches of all workers.
    """

    projector_depth: int = 3
    projector_hidden_dim: int | None = None
    projector_dim: int = 2048
    predictor_hidden_dim: int = 512
    fixed_predictor_learning_rate: bool = True
    sync_batchnorm: bool = True


@dataclass(frozen=True)
class CamtrastSimSiamConfig(SimSiamPartConfig):
    """CAMtrast with SimSiam.

    Attributes:
        variant: paper, or code: the algorithm of the released code, with two optimiser steps per batch; there
            cam_warmup_epochs is the epoch, counted from 1, in which the second step starts (None: at 30 % of the run).
    """

    variant: Variant = "paper"


class CamtrastMoCo(nn.Module):
    """Original images are queries, suppressed ones keys of the momentum encoder."""

    fixed_learning_rate: tuple[str, ...] = ()
    # During the warm-up the projector takes no part in the loss.
    has_unused_parameters = True
    shuffle_seed: Tensor

    @staticmethod
    def validate(config: CamtrastMoCoConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_camtrast(config, context, "camtrast_moco")
        validate_momentum_contrast(config, context, "camtrast_moco")

    def __init__(self, config: CamtrastMoCoConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        width = backbone.num_features
        hidden = config.projector_hidden_dim or width
        self.classifier = nn.Linear(width, context.num_classes)
        self.projector = mlp_head(width, hidden, config.projector_dim, config.projector_depth)
        num_splits = resolve_bn_splits(config.bn_splits, config.shuffle_bn, context)
        convert_batchnorm(self, "split" if num_splits > 1 else "local", num_splits)
        self.momentum_encoder = MomentumEncoder(self._encoder())
        # From the global generator like the weights; DDP shares rank 0's. A buffer, so that resume continues it.
        self.register_buffer("shuffle_seed", torch.randint(2**62, ()))
        generator = torch.Generator().manual_seed(int(self.shuffle_seed))
        dim = head_dim(width, config.projector_dim, config.projector_depth)
        self.queue = FeatureQueue(config.queue_size, dim, generator=generator)

    def _encoder(self) -> nn.Sequential:
        return nn.Sequential(self.backbone, self.projector)

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """CE(x) during the warm-up, then CE(x) + CE(x') + InfoNCE(x, x')."""
        x = one_view(batch, "camtrast_moco")
        self.follow(progress)
        original = classify_original(self, x, batch.labels)
        if is_warmup(self.config, progress):
            return original.term
        x_suppressed, monitors = suppressed_images(self, x, original.features_BChw, batch.labels)
        suppressed, _ = classify_suppressed(self, x_suppressed, batch.labels)
        contrasted = self.contrast_term(original.pooled_BC, x_suppressed, batch, progress)
        return summed(original.term, suppressed, contrasted, monitors=monitors)

    def follow(self, progress: Progress) -> None:
        """Moves the momentum encoder, once per optimiser step and before its keys (MoCo)."""
        if progress.micro_step == 0:
            self.momentum_encoder.update(self._encoder(), self.config.momentum)

    def contrast_term(self, pooled_BC: Tensor, x_second: Tensor, batch: Batch, progress: Progress) -> StepOutput:
        """InfoNCE of the pooled features of x (queries) against keys of the second view, which enter the queue."""
        q_BD = unit_vectors(self.projector(pooled_BC))
        k_BD = self._keys(x_second, progress)
        self.queue.stage(k_BD, batch.labels, batch.index, progress.micro_step)
        result = contrast(q_BD, k_BD, self.queue.keys, self.config.temperature)
        metrics = {"loss_self": result.loss.detach(), "contrast_top1": result.top1}
        metrics["negative_similarity"] = result.negative_similarity
        return StepOutput(result.loss, metrics | contrast_monitors(q_BD, k_BD))

    @torch.no_grad()
    def _keys(self, images: Tensor, progress: Progress) -> Tensor:
        def encode(x: Tensor) -> Tensor:
            return unit_vectors(self.momentum_encoder(x))

        if not self.config.shuffle_bn:
            return encode(images)
        counter = progress.step * progress.num_micro_steps + progress.micro_step
        return shuffled_encode(encode, images, self.shuffle_seed, counter)

    def after_step(self, progress: Progress) -> None:
        """The keys of the step enter the queue."""
        if not is_warmup(self.config, progress):
            self.queue.enqueue_staged()


def simsiam_term(method: Any, pooled_BC: Tensor, pooled_second_BC: Tensor) -> StepOutput:
    """-cos(sg(z), g(z')) of the pooled features of x and of its second view."""
    with torch.no_grad():  # stop-gradient; z still updates the projector's running statistics
        z_BD = method.projector(pooled_BC)
    p_BD = method.predictor(method.projector(pooled_second_BC))
    loss = negative_cosine(p_BD, z_BD)
    return StepOutput(loss, {"loss_self": loss.detach()} | feature_monitors(p_BD))


class CamtrastSimSiam(nn.Module):
    """The prediction from a suppressed image approaches the projection of the original one."""

    # During the warm-up and in the first phase of the code, projector and predictor take no part in the loss.
    has_unused_parameters = True

    @staticmethod
    def validate(config: CamtrastSimSiamConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        validate_camtrast(config, context, "camtrast_simsiam")
        validate_heads(config, context, "camtrast_simsiam")
        if config.variant not in get_args(Variant):
            raise ValueError(f"variant={config.variant!r} must be one of: {', '.join(get_args(Variant))}.")

    def __init__(self, config: CamtrastSimSiamConfig, backbone: Any, context: MethodContext) -> None:
        super().__init__()
        self.validate(config, context)
        self.config = config
        self.backbone = backbone
        self.classifier = nn.Linear(backbone.num_features, context.num_classes)
        self.projector, self.predictor = build_heads(config, backbone.num_features)
        self.fixed_learning_rate: tuple[str, ...] = ("predictor.",) if config.fixed_predictor_learning_rate else ()
        self._code = TwoSteps() if config.variant == "code" else None
        if config.sync_batchnorm and context.world_size > 1:
            convert_batchnorm(self, "sync")

    def num_phases(self, progress: Progress) -> int:
        """Two optimiser steps per batch in the variant of the code after its warm-up, else one."""
        return 1 if self._code is None or is_warmup_code(self.config, progress) else 2

    def forward(self, batch: Batch, progress: Progress) -> StepOutput:
        """CE(x) during the warm-up, then CE(x) + CE(x') - cos(sg(z), g(z')); or the phase of the code."""
        if self._code is not None:
            return self._code.forward(self, batch, progress)
        x = one_view(batch, "camtrast_simsiam")
        original = classify_original(self, x, batch.labels)
        if is_warmup(self.config, progress):
            return original.term
        x_suppressed, monitors = suppressed_images(self, x, original.features_BChw, batch.labels)
        suppressed, pooled_suppressed_BC = classify_suppressed(self, x_suppressed, batch.labels)
        attracted = simsiam_term(self, original.pooled_BC, pooled_suppressed_BC)
        return summed(original.term, suppressed, attracted, monitors=monitors)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
