"""CAMtrast as its released code trains it (``jinghanSunn/CAMtrast: train.py, util.py, models/simsiam.py``).

``variant="code"`` of ``camtrast_simsiam``. The code's MoCo path is dead (nothing updates the momentum encoder after the
start and no loss reads it or the memory), so ``camtrast_moco`` has no such variant. On each batch, from epoch t on:

    phase 0:  L = CE(W f(x), y); optimiser step                              (before epoch t, this alone)
    phase 1:  L = CE(W f(x'), y) - [cos(g(z), sg(z')) + cos(g(z'), sg(z))] / 2; optimiser step

with z = p(f(x)), z' = p(f(x')) and x' = (1 - M) * x. Where it differs from the paper, which is ``variant="paper"``:

1. M is the CAM of the class that the network predicts for x in phase 0, not of the label.
2. Two optimiser steps per batch, not one on the sum. M therefore joins the features of x before the first step to
   the classifier weights after it.
3. SimSiam's loss is symmetric; the paper's Eq. 5 has only the term of g(z').
4. x passes the network again in phase 1, so BatchNorm's running statistics see x twice and x' once.
5. The small map is scaled to [0, 1], then resized (``cv2.resize``, bilinear); the paper resizes first. The code's
   factors 255 and 1/255 cancel, and nothing is rounded. A constant map is 0 / 0 there; here it hides nothing.
6. Phase 1 starts at ``epoch >= t`` with epochs counted from 1: t - 1 epochs of warm-up, one less than in the paper.
   ``cam_warmup_epochs`` is t; None takes the 30 % of the README's command (t = 30 of 100 epochs).

The preset ``camtrast_code`` also takes what the code sets outside the algorithm:

7. Views: the heavy augmentation ``VIEWS_CODE``. 8. Optimiser: ``OPTIMIZER_CODE``.
9. The predictor's learning rate decays too: the code marks it ``fix_lr``, but its scheduler does not look
   (``fixed_predictor_learning_rate=False``).
10. BatchNorm on each GPU's own images (DataParallel): ``sync_batchnorm=False``.

Not taken over: with PyTorch 1.4, which the paper names, ``zero_grad`` leaves zeros, so that in phase 0 projector and
predictor coasted on momentum and weight decay. Since PyTorch 2.0 the same line leaves None and they rest, as here.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from methods.camtrast_parts import (
    CamtrastConfig,
    classify_original,
    classify_suppressed,
    one_view,
    summed,
    suppressed_images,
)
from methods.contracts import Batch, Progress, StepOutput
from methods.monitors import feature_monitors
from methods.optimizers import OptimizerConfig
from methods.simsiam import negative_cosine

__all__ = ["OPTIMIZER_CODE", "VIEWS_CODE", "TwoSteps", "is_warmup_code", "warmup_epochs_code"]

VIEWS_CODE = ("camtrast_code",)
# ``train.py``: --learning_rate 0.05 (README: batch 256) --lr_decay_epochs 60,80 of 100 --weight_decay 5e-4.
OPTIMIZER_CODE = OptimizerConfig(
    optimizer="sgd",
    learning_rate=0.05,
    weight_decay=5e-4,
    schedule="step",
    schedule_every="epoch",
    milestones=(0.6, 0.8),
    decay=0.1,
)
# README: --epochs 100 --epoch_t 30.
EPOCH_T_SHARE = 0.3


def warmup_epochs_code(config: CamtrastConfig, total_epochs: int) -> int:
    """Epochs that train only CE(x): those before epoch t, counted from 1.

    Raises:
        ValueError: the second step would never start.
    """
    t = config.cam_warmup_epochs
    if t is None:
        t = round(EPOCH_T_SHARE * total_epochs)
    if t > total_epochs:
        raise ValueError(
            f"cam_warmup_epochs={t} starts CAMtrast's second step in epoch {t} of a run of {total_epochs} epochs: it "
            "would be plain cross entropy. Set fewer warm-up epochs or more epochs."
        )
    return max(t - 1, 0)


def is_warmup_code(config: CamtrastConfig, progress: Progress) -> bool:
    """Whether this epoch trains only CE(x), with one optimiser step per batch."""
    return progress.epoch < warmup_epochs_code(config, progress.total_epochs)


class TwoSteps:
    """The two phases; keeps what phase 1 needs of phase 0, for each micro-step. No part of the saved state.

    The method that is passed in has `backbone`, `classifier`, `projector`, `predictor` and `config`.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def forward(self, method: Any, batch: Batch, progress: Progress) -> StepOutput:
        """The loss of ``progress.phase``."""
        x = one_view(batch, "camtrast_simsiam")
        if progress.phase == 1:
            return self._second(method, x, batch.labels, progress.micro_step)
        original = classify_original(method, x, batch.labels)
        if progress.micro_step == 0:
            self._kept.clear()  # what an abandoned step left
        if not is_warmup_code(method.config, progress):
            predicted = original.logits_BK.detach().argmax(dim=1)
            self._kept[progress.micro_step] = (original.features_BChw.detach(), predicted)
        return original.term

    def _second(self, method: Any, x: Tensor, labels: Tensor, micro_step: int) -> StepOutput:
        assert micro_step in self._kept, "phase 1 before phase 0: the loop must follow num_phases"
        features_BChw, predicted_B = self._kept.pop(micro_step)
        x_suppressed, monitors = suppressed_images(method, x, features_BChw, predicted_B, "scale_then_upsample")
        z_BD = method.projector(method.backbone(x))
        suppressed, pooled = classify_suppressed(method, x_suppressed, labels)
        z_suppressed_BD = method.projector(pooled)
        p_BD, p_suppressed_BD = method.predictor(z_BD), method.predictor(z_suppressed_BD)
        loss = negative_cosine(p_BD, z_suppressed_BD.detach()) + negative_cosine(p_suppressed_BD, z_BD.detach())
        metrics = {"loss_self": loss.detach() / 2} | feature_monitors(p_suppressed_BD)
        return summed(suppressed, StepOutput(loss / 2, metrics), monitors=monitors)
