"""Projectors and predictors: small stacks of linear layers, built from switchable parts."""

from __future__ import annotations

from typing import Any, Literal

from torch import nn

from methods.contracts import MethodContext

__all__ = ["head_dim", "mlp_head", "validate_head_batch", "validate_projector"]


def head_dim(in_dim: int, out_dim: int, depth: int) -> int:
    """Width of what ``mlp_head`` returns: without layers (depth 0) the input width."""
    return out_dim if depth else in_dim


def mlp_head(
    in_dim: int,
    hidden_dim: int,
    out_dim: int,
    depth: int,
    *,
    batchnorm: bool = False,
    relu: bool = True,
    hidden_bias: bool | None = None,
    output_bias: bool | Literal["frozen"] = True,
    output_batchnorm: Literal["none", "affine", "gain", "plain"] = "none",
) -> nn.Sequential:
    """``depth - 1`` blocks Linear-[BN]-[ReLU] and a last Linear-[BN].

    MoCo v2 is ``depth=2``; SimSiam's projector ``depth=3, batchnorm=True, output_bias="frozen",
    output_batchnorm="plain"``; its predictor ``depth=2, batchnorm=True``.

    Args:
        in_dim: width of the input.
        hidden_dim: width between the layers; unused with fewer than two layers.
        out_dim: width of the output; unused without layers.
        depth: number of linear layers. 0 returns the identity, whose output width is `in_dim`.
        batchnorm: BatchNorm after every linear layer but the last.
        relu: ReLU after every linear layer but the last.
        hidden_bias: bias in the linear layers before the last; by default only where no BatchNorm follows, because
            BatchNorm subtracts it again.
        output_bias: bias of the last layer; "frozen" keeps it at its random initial value (the official SimSiam code).
        output_batchnorm: after the last layer: none, BatchNorm with gain and bias, with gain only (SimCLR), or plain
            BatchNorm without either (SimSiam).

    Returns:
        A module (B, in_dim) -> (B, head_dim(in_dim, out_dim, depth)).

    Raises:
        ValueError: negative depth or a width below 1.
    """
    if depth < 0:
        raise ValueError(f"A head needs depth >= 0 (number of linear layers, 0 = none), got {depth}.")
    if depth and min(in_dim, hidden_dim, out_dim) < 1:
        raise ValueError(f"Head widths must be at least 1, got {in_dim}, {hidden_dim}, {out_dim} (in, hidden, out).")
    layers: list[nn.Module] = []
    if hidden_bias is None:
        hidden_bias = not batchnorm
    for i in range(depth - 1):
        layers.append(nn.Linear(in_dim if i == 0 else hidden_dim, hidden_dim, bias=hidden_bias))
        layers += [nn.BatchNorm1d(hidden_dim)] if batchnorm else []
        layers += [nn.ReLU(inplace=True)] if relu else []
    if depth:
        last = nn.Linear(in_dim if depth == 1 else hidden_dim, out_dim, bias=bool(output_bias))
        if output_bias == "frozen":
            last.bias.requires_grad_(False)
        layers.append(last)
        if output_batchnorm != "none":
            batchnorm_out = nn.BatchNorm1d(out_dim, affine=output_batchnorm != "plain")
            if output_batchnorm == "gain":
                batchnorm_out.bias.requires_grad_(False)
            layers.append(batchnorm_out)
    return nn.Sequential(*layers)


def validate_head_batch(context: MethodContext, sync_batchnorm: bool) -> None:
    """Raises ``ValueError`` if BatchNorm on vectors would see a single image per forward pass."""
    workers = 1 if sync_batchnorm else context.world_size
    images = context.global_batch_size // (workers * context.num_micro_steps)
    if images < 2:
        raise ValueError(
            f"BatchNorm in the head would see {images} image per forward pass (global batch "
            f"{context.global_batch_size}, {context.world_size} workers, {context.num_micro_steps} micro-steps); it "
            "needs at least 2. Use a larger batch, fewer workers or fewer micro-steps."
        )


def validate_projector(config: Any, method: str) -> None:
    """Raises ``ValueError`` for a depth or width that ``mlp_head`` cannot build.

    Args:
        config: has projector_depth, projector_hidden_dim (None = the feature width) and projector_dim.
        method: name for the message.
    """
    hidden = config.projector_hidden_dim
    if config.projector_depth < 0 or min(config.projector_dim, 1 if hidden is None else hidden) < 1:
        raise ValueError(
            f"{method} got projector_depth={config.projector_depth}, projector_hidden_dim={hidden}, "
            f"projector_dim={config.projector_dim}; the depth must be at least 0 and the widths at least 1."
        )
