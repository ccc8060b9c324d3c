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
- BatchNorm: ShuffleBN as in MoCo for the keys, synchronised BatchNorm as in SimSiam.
- While only the classifier is trained, the momentum encoder already follows f; the queue is not written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from methods.batchnorm import convert_batchnorm
from methods.cam import SuppressTo, class_activation_map, normalized_mask, suppress
from methods.contracts import Batch, MethodContext, Progress, StepOutput
from methods.heads import head_dim, mlp_head
from methods.losses import contrast
from methods.moco import unit_vectors, validate_momentum_contrast
from methods.momentum_encoder import MomentumEncoder, resolve_bn_splits, shuffled_encode
from methods.monitors import contrast_monitors, feature_monitors
from methods.optimizers import OptimizerConfig
from methods.queue import FeatureQueue
from methods.simsiam import build_heads, negative_cosine, validate_heads
from methods.supervised import accuracy, cross_entropy, validate_classes

__all__ = [
    "OPTIMIZER",
    "VIEWS",
    "CamtrastMoCo",
    "CamtrastMoCoConfig",
    "CamtrastSimSiam",
    "CamtrastSimSiamConfig",
    "warmup_epochs",
]

# The paper drops the heavy contrastive augmentation: x is a crop and a flip.
VIEWS = ("light",)
# "As for unsupervised learning", lr 0.03 (the paper's supplement); the rest as MoCo v2.
OPTIMIZER = OptimizerConfig(
    optimizer="sgd", learning_rate=0.03, weight_decay=1e-4, schedule="cosine", schedule_every="epoch"
)
# 30 of 1,000 epochs on miniImageNet.
WARMUP_SHARE = 0.03


@dataclass(frozen=True)
class CamtrastConfig:
    """What both variants share.

    Attributes:
        cam_warmup_epochs: epochs that train only the classifier on x; None takes 3 % of the run but at least one epoch
            (the paper: 30 of 1,000 on miniImageNet and CIFAR-FS, 50 of 500 on tieredImageNet).
        suppress_to: what a hidden region becomes: mean_color (the normalised tensor is multiplied, as in the authors'
            code) or black (the pixels are multiplied).
    """

    cam_warmup_epochs: int | None = None
    suppress_to: SuppressTo = "mean_color"


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
class CamtrastSimSiamConfig(CamtrastConfig):
    """CAMtrast with SimSiam.

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


def warmup_epochs(config: CamtrastConfig, total_epochs: int) -> int:
    """Epochs that train only CE(x).

    Raises:
        ValueError: no epoch would be left for the method itself.
    """
    if config.cam_warmup_epochs is None:
        return min(max(1, round(WARMUP_SHARE * total_epochs)), total_epochs - 1)
    if config.cam_warmup_epochs >= total_epochs:
        raise ValueError(
            f"cam_warmup_epochs={config.cam_warmup_epochs} leaves nothing of a run of {total_epochs} epochs: CAMtrast "
            "would be plain cross entropy. Set fewer warm-up epochs or more epochs."
        )
    return config.cam_warmup_epochs


def _validate(config: CamtrastConfig, context: MethodContext, method: str) -> None:
    validate_classes(context, method)
    if config.cam_warmup_epochs is not None and config.cam_warmup_epochs < 0:
        raise ValueError(f"cam_warmup_epochs={config.cam_warmup_epochs} is not allowed: it must be at least 0.")
    if config.suppress_to not in get_args(SuppressTo):
        raise ValueError(f"suppress_to={config.suppress_to!r} must be one of: {', '.join(get_args(SuppressTo))}.")
    if context.feature_map_side == 1:
        raise ValueError(
            f"{method} needs a class activation map, but the last feature map of {context.image_size} px images is a "
            "single location with this backbone and stem. Use larger images or the small stem."
        )


class _Classified(NamedTuple):
    """The pathways that both variants share; `suppressed` and `pooled_suppressed` are None during the warm-up."""

    loss: Tensor
    pooled: Tensor
    suppressed: Tensor | None
    pooled_suppressed: Tensor | None
    metrics: dict[str, Tensor]


def _classify(method: Any, batch: Batch, progress: Progress) -> _Classified:
    """CE(x), the suppressed images x', and CE(x'); one forward of the backbone for x and one for x'."""
    (x,), labels = batch.views, batch.labels
    features_BChw = method.backbone.forward_features(x)
    pooled = features_BChw.mean(dim=(2, 3))
    logits = method.classifier(pooled)
    loss_x = cross_entropy(logits, labels)
    metrics = {"accuracy": accuracy(logits, labels), "loss_original": loss_x.detach()}
    if progress.epoch < warmup_epochs(method.config, progress.total_epochs):
        return _Classified(loss_x, pooled, None, None, metrics)
    cam_Bhw = class_activation_map(features_BChw, method.classifier.weight, labels)
    if cam_Bhw[0].numel() == 1:
        raise ValueError(
            f"The feature map of a {x.shape[2]}x{x.shape[3]} image is a single location, so its CAM hides nothing. Use "
            "the small stem or larger images for CAMtrast."
        )
    mask, is_constant = normalized_mask(cam_Bhw, (x.shape[2], x.shape[3]))
    x_suppressed = suppress(x, mask, method.config.suppress_to)
    pooled_suppressed = method.backbone(x_suppressed)
    logits_suppressed = method.classifier(pooled_suppressed)
    loss_suppressed = cross_entropy(logits_suppressed, labels)
    metrics |= {
        "accuracy_suppressed": accuracy(logits_suppressed, labels),
        "loss_suppressed": loss_suppressed.detach(),
        "suppressed_share": mask.mean(),
        "constant_cams": is_constant.float().mean(),
    }
    return _Classified(loss_x + loss_suppressed, pooled, x_suppressed, pooled_suppressed, metrics)


class CamtrastMoCo(nn.Module):
    """Original images are queries, suppressed ones keys of the momentum encoder."""

    fixed_learning_rate: tuple[str, ...] = ()
    # During the warm-up the projector takes no part in the loss.
    has_unused_parameters = True
    shuffle_seed: Tensor

    @staticmethod
    def validate(config: CamtrastMoCoConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        _validate(config, context, "camtrast_moco")
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
        if progress.micro_step == 0:  # MoCo: before the keys of the step
            self.momentum_encoder.update(self._encoder(), self.config.momentum)
        classified = _classify(self, batch, progress)
        if classified.suppressed is None:
            return StepOutput(classified.loss, classified.metrics)
        q_BD = unit_vectors(self.projector(classified.pooled))
        k_BD = self._keys(classified.suppressed, progress)
        self.queue.stage(k_BD, batch.labels, batch.index, progress.micro_step)
        result = contrast(q_BD, k_BD, self.queue.keys, self.config.temperature)
        metrics = (
            classified.metrics
            | {
                "loss_self": result.loss.detach(),
                "contrast_top1": result.top1,
            }
            | contrast_monitors(q_BD, k_BD, self.queue.keys)
        )
        return StepOutput(classified.loss + result.loss, metrics)

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
        if progress.epoch >= warmup_epochs(self.config, progress.total_epochs):
            self.queue.enqueue_staged()


class CamtrastSimSiam(nn.Module):
    """The prediction from a suppressed image approaches the projection of the original one."""

    # During the warm-up projector and predictor take no part in the loss.
    has_unused_parameters = True

    @staticmethod
    def validate(config: CamtrastSimSiamConfig, context: MethodContext) -> None:
        """Raises ``ValueError`` for a setting that cannot train."""
        _validate(config, context, "camtrast_simsiam")
        validate_heads(config, context, "camtrast_simsiam")

    def __init__(self, config: CamtrastSimSiamConfig, backbone: Any, context: MethodContext) -> None:
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
        """CE(x) during the warm-up, then CE(x) + CE(x') - cos(sg(z), g(z'))."""
        classified = _classify(self, batch, progress)
        if classified.pooled_suppressed is None:
            return StepOutput(classified.loss, classified.metrics)
        with torch.no_grad():  # stop-gradient; z still updates the projector's running statistics
            z_BD = self.projector(classified.pooled)
        p_BD = self.predictor(self.projector(classified.pooled_suppressed))
        loss_self = negative_cosine(p_BD, z_BD)
        metrics = classified.metrics | {"loss_self": loss_self.detach()} | feature_monitors(p_BD)
        return StepOutput(classified.loss + loss_self, metrics)

    def after_step(self, progress: Progress) -> None:
        """Nothing follows the optimiser step."""
