"""Features in blocks of rows: what the analyses of whole training sets share, without a second copy of the features.

50,000 images of 2048 dimensions are 400 MB of float32; a copy in float64 would be 800 MB more. Everything here converts
a block of rows at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "as_tensor",
    "centred_scatter",
    "float64_blocks",
    "inverse_norms",
    "mean_row",
    "row_norms",
    "unit_rows",
    "warn_of_zero_rows",
]

BLOCK = 512  # rows converted at once: 8 MB of float64 at 2048 dimensions
NORM_BLOCK = 128


def as_tensor(x: np.ndarray) -> Tensor:
    """The same memory, only to be read; arrays of Ray's object store are read-only, which torch would warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(x)


def row_norms(rows: Tensor) -> Tensor:
    """Lengths, float64 (N,), of rows (N, D)."""
    # One small buffer that stays in the cache: new blocks of float64 take four times as long.
    buffer = torch.empty(NORM_BLOCK, rows.shape[1], dtype=torch.float64, device=rows.device)
    return torch.cat([buffer[: len(block)].copy_(block).norm(dim=1) for block in rows.split(NORM_BLOCK)])


def inverse_norms(norms: Tensor) -> Tensor:
    """1 / length, and 0 for a zero vector, which stays zero under the scaling."""
    return torch.where(norms > 0, 1 / norms, 0)


def warn_of_zero_rows(norms: Tensor, split: str, stacklevel: int) -> None:
    """RuntimeWarning with the number of zero vectors, if there are any."""
    num_zero = int((norms == 0).sum())
    if num_zero:
        message = f"{num_zero:,} of {len(norms):,} feature vectors of split {split!r} are zero and stay zero"
        warnings.warn(message, RuntimeWarning, stacklevel=stacklevel + 1)


def unit_rows(x: np.ndarray, split: str) -> np.ndarray:
    """Rows (N, D) at unit length, float32; a zero row stays zero, which is warned about with the split's name."""
    rows = as_tensor(x)
    norms = row_norms(rows)
    warn_of_zero_rows(norms, split, stacklevel=2)
    scales = inverse_norms(norms)[:, None]
    result = np.empty(x.shape, np.float32)
    for start, block in zip(range(0, len(x), BLOCK), rows.split(BLOCK), strict=True):
        result[start : start + BLOCK] = block.double() * scales[start : start + BLOCK]
    return result


def float64_blocks(rows: Tensor, device: str = "cpu", scales: Tensor | None = None) -> Iterator[Tensor]:
    """Blocks of rows (N, D) on a device in float64, each row times its entry of ``scales`` (N,)."""
    for start, block in zip(range(0, len(rows), BLOCK), rows.split(BLOCK), strict=True):
        converted = block.to(device).double()
        if scales is not None:
            converted.mul_(scales[start : start + BLOCK, None].to(device))
        yield converted


def mean_row(rows: Tensor, device: str = "cpu", scales: Tensor | None = None) -> Tensor:
    """Mean (D,) of the scaled rows, float64."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64, device=device)
    for block in float64_blocks(rows, device, scales):
        total += block.sum(dim=0)
    return total / len(rows)


def centred_scatter(rows: Tensor, mean: Tensor, device: str = "cpu", scales: Tensor | None = None) -> Tensor:
    """``sum_i (x_i - mean)(x_i - mean)^T`` (D, D) of the scaled rows, float64."""
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for block in float64_blocks(rows, device, scales):
        centred = block.sub_(mean)
        scatter.addmm_(centred.T, centred)
    return scatter
