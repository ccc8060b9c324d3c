"""Training steps built from lightly's modules, as in lightly's documentation: the other side of ``method_step.py``."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torchvision
from lightly.loss import NegativeCosineSimilarity, NTXentLoss, SwaVLoss
from lightly.models.modules import (
    BYOLPredictionHead,
    BYOLProjectionHead,
    MoCoProjectionHead,
    SimCLRProjectionHead,
    SimSiamPredictionHead,
    SimSiamProjectionHead,
    SwaVProjectionHead,
    SwaVPrototypes,
)
from lightly.models.utils import deactivate_requires_grad, update_momentum
from torch import Tensor, nn

__all__ = ["LIGHTLY", "lightly_modules"]

LossFn = Callable[[list[Tensor]], Tensor]
NUM_PROTOTYPES = 3000


def _backbone(args: argparse.Namespace) -> tuple[nn.Module, int]:
    backbone = getattr(torchvision.models, args.backbone)()
    width = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone.to(args.device).train(), width


def _moco(args: argparse.Namespace) -> tuple[list[nn.Module], LossFn]:
    (backbone, width), (backbone_m, _) = _backbone(args), _backbone(args)
    head = MoCoProjectionHead(width, width, 128).to(args.device)
    head_m = MoCoProjectionHead(width, width, 128).to(args.device)
    deactivate_requires_grad(backbone_m)
    deactivate_requires_grad(head_m)
    criterion = NTXentLoss(temperature=0.2, memory_bank_size=(args.queue_size, 128)).to(args.device)

    def loss(views: list[Tensor]) -> Tensor:
        update_momentum(backbone, backbone_m, m=0.999)
        update_momentum(head, head_m, m=0.999)
        query = head(backbone(views[0]))
        with torch.no_grad():
            key = head_m(backbone_m(views[1]))
        return criterion(query, key)

    return [backbone, head], loss


def _simsiam(args: argparse.Namespace) -> tuple[list[nn.Module], LossFn]:
    backbone, width = _backbone(args)
    projector = SimSiamProjectionHead(width, width, 2048).to(args.device)
    predictor = SimSiamPredictionHead(2048, 512, 2048).to(args.device)
    criterion = NegativeCosineSimilarity()

    def loss(views: list[Tensor]) -> Tensor:
        z_1, z_2 = (projector(backbone(view)) for view in views)
        p_1, p_2 = predictor(z_1), predictor(z_2)
        return 0.5 * (criterion(p_1, z_2.detach()) + criterion(p_2, z_1.detach()))

    return [backbone, projector, predictor], loss


def _simclr(args: argparse.Namespace) -> tuple[list[nn.Module], LossFn]:
    backbone, width = _backbone(args)
    head = SimCLRProjectionHead(width, width, 128).to(args.device)
    criterion = NTXentLoss(temperature=0.1)

    def loss(views: list[Tensor]) -> Tensor:
        z_1, z_2 = (head(backbone(view)) for view in views)
        return criterion(z_1, z_2)

    return [backbone, head], loss


def _byol(args: argparse.Namespace) -> tuple[list[nn.Module], LossFn]:
    (backbone, width), (backbone_m, _) = _backbone(args), _backbone(args)
    head = BYOLProjectionHead(width, 4096, 256).to(args.device)
    head_m = BYOLProjectionHead(width, 4096, 256).to(args.device)
    predictor = BYOLPredictionHead(256, 4096, 256).to(args.device)
    deactivate_requires_grad(backbone_m)
    deactivate_requires_grad(head_m)
    criterion = NegativeCosineSimilarity()

    def loss(views: list[Tensor]) -> Tensor:
        update_momentum(backbone, backbone_m, m=0.996)
        update_momentum(head, head_m, m=0.996)
        p_1, p_2 = (predictor(head(backbone(view))) for view in views)
        with torch.no_grad():
            t_1, t_2 = (head_m(backbone_m(view)) for view in views)
        return 0.5 * (criterion(p_1, t_2) + criterion(p_2, t_1))

    return [backbone, head, predictor], loss


def _swav(args: argparse.Namespace) -> tuple[list[nn.Module], LossFn]:
    backbone, width = _backbone(args)
    head = SwaVProjectionHead(width, width, 128).to(args.device)
    prototypes = SwaVPrototypes(128, n_prototypes=NUM_PROTOTYPES).to(args.device)
    criterion = SwaVLoss()

    def loss(views: list[Tensor]) -> Tensor:
        prototypes.normalize()
        scores = [prototypes(nn.functional.normalize(head(backbone(view)), dim=1)) for view in views]
        return criterion(scores[:2], scores[2:])

    return [backbone, head, prototypes], loss


LIGHTLY: dict[str, Callable[[argparse.Namespace], tuple[list[nn.Module], LossFn]]] = {
    "moco_v2": _moco,
    "simsiam": _simsiam,
    "simclr": _simclr,
    "byol": _byol,
    "swav": _swav,
}


def lightly_modules(args: argparse.Namespace, method: str) -> tuple[list[nn.Module], LossFn]:
    """Modules to train and the loss of a list of views."""
    torch.manual_seed(0)
    return LIGHTLY[method](args)
