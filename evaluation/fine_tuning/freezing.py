"""Layers that are not fine-tuned, with the BatchNorm mode said out loud (papers disagree silently)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["Freezing", "set_training_mode"]


@dataclass(frozen=True)
class Freezing:
    """Which part of the backbone stays as it is (papers.md section 4.14: Newell & Deng detach after stage k).

    Attributes:
        stages: frozen entries of ``backbone.stages``, from the stem on: 0 trains everything, 1 freezes the stem, ...
        batchnorm: of the frozen stages: train lets their running statistics move and normalises by the batch, as in
            ``princeton-vl/selfstudy: models/resnet.py``; eval keeps the pretrained statistics.
    """

    stages: int = 0
    batchnorm: Literal["train", "eval"] = "train"

    def apply(self, backbone: Any) -> None:
        """Take the frozen stages out of training.

        Raises:
            ValueError: more stages than the backbone has.
        """
        stages: list[nn.Module] = backbone.stages
        if not 0 <= self.stages <= len(stages):
            raise ValueError(
                f"{self.stages} stages are to be frozen, but the backbone has {len(stages)} (the stem counts): give 0 "
                f"(train everything) to {len(stages)} (train the head alone)."
            )
        for stage in stages[: self.stages]:
            stage.requires_grad_(False)


def set_training_mode(model: nn.Module, backbone: Any, freezing: Freezing) -> None:
    """Training mode, with BatchNorm of frozen stages in the mode that was asked for."""
    model.train()
    if freezing.stages and freezing.batchnorm == "eval":
        for stage in backbone.stages[: freezing.stages]:
            for module in stage.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
