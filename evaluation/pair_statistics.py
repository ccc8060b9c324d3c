"""Four numbers that depend on the distances between all pairs of images, from one pass over the pairs.

With unit-length features ``z`` (a zero vector stays zero), raw features ``x``, N images and the kernel
``g_ij = exp(-t |z_i - z_j|^2)`` (t = 2):

* uniformity ``-ln mean_{i<j} g_ij`` (Wang & Isola, ICML 2020; Sun et al., AAAI 2022, Eq. 2), and the same of ``x``;
* vMF-kernel entropy ``-(1/N) sum_i ln( 1/(N-1) sum_{j != i} g_ij )``: the resubstitution estimate of the features'
  entropy with a von Mises-Fisher kernel density of concentration 2t, up to the kernel's constant (Wang & Isola,
  section 4, "relation with feature distribution entropy estimation"). We leave the image itself out of its own density,
  which the paper does not: with the constant g_ii = 1 the estimate would depend on N. By Jensen it is never below the
  uniformity, and equal where every image sees the same density;
* KoLeo ``(1/N) sum_i ln( min_{j != i} |z_i - z_j| + 1e-8 )``: the part of the Kozachenko-Leonenko (1987)
  nearest-neighbour entropy that depends on the features, with the sign of an entropy (the opposite of the loss of
  Sablayrolles et al., ICLR 2019; the 1e-8, which keeps duplicates finite, is ``facebookresearch/dinov2``'s). It falls
  with the number of images, so compare it at equal N only.

The upper triangle is walked in blocks: each block of inner products is computed once, into a reused buffer, and gives
all four; sums over pairs are float64. The products are of the float32 features as they lie, so nothing is copied.

Rounding. A product of float32 vectors is good to about 1e-7 |x||y|: the kernel of unit-length features is safe, but two
differences are not. The raw distance of long vectors: where its rounding could move U by more than 0.1 % (or 0.001),
the pass is repeated with float64 products. The distance of nearly equal directions: images whose nearest neighbour
seems closer than 0.01 look for it again with float64 products, and distances below 0.3 are recomputed from the
difference of the two vectors.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluation.feature_blocks import as_tensor, inverse_norms, row_norms

__all__ = ["PairStatistics", "pair_statistics"]

BLOCK = 512  # rows; a block of float32 products is 1 MB, and larger blocks make the products no faster
NEGLIGIBLE = -45.0  # e^-45 of the largest term: even 10^12 such pairs add 3e-8 of it
RAW_ACCURACY = 1e-3
CLOSE = 0.01  # distance of unit vectors; float32 products round its square by about 4e-7
FAR = 0.3  # distance above which that rounding moves it by less than 2e-6 of itself
KOLEO_FLOOR = 1e-8
FLOAT32_LENGTHS = (1e-12, 1e12)  # outside, float32 products of two vectors may underflow or overflow


class PairStatistics(NamedTuple):
    """Statistics of all pairs; formulas in the module's docstring.

    Attributes:
        uniformity: of unit-length features.
        raw_uniformity: of the features as they are.
        vmf_entropy: nats, up to the kernel's constant.
        koleo: mean logarithm of the nearest neighbour's distance, unit-length features.
        nearest: distance of each image's nearest neighbour, float64 (N,), unit-length features.
    """

    uniformity: float
    raw_uniformity: float
    vmf_entropy: float
    koleo: float
    nearest: np.ndarray


def pair_statistics(x: np.ndarray, t: float = 2.0, device: str = "cpu") -> PairStatistics:
    """All four statistics of features.

    Args:
        x: float32 (N, D), N at least 2.
        t: scale of the squared distance, at most 20 (e^-4t is then still a float32).
        device: where to compute; on a GPU the features are moved there.
    """
    rows = as_tensor(x).to(device)
    norms = row_norms(rows)
    present = norms[norms > 0]
    shortest, longest = (float(present.min()), float(present.max())) if len(present) else (1.0, 1.0)
    fits = FLOAT32_LENGTHS[0] <= shortest and longest <= FLOAT32_LENGTHS[1]
    found = _TrianglePass(rows, norms, t, torch.float32 if fits else torch.float64).run()
    rounding = 2 * t * torch.finfo(torch.float32).eps * longest**2
    if fits and rounding > RAW_ACCURACY * max(1.0, found.raw_uniformity()):
        found = _TrianglePass(rows, norms, t, torch.float64).run()
    nearest = _nearest_distances(found, norms)
    return PairStatistics(
        found.uniformity(),
        found.raw_uniformity(),
        found.vmf_entropy(),
        float((nearest + KOLEO_FLOOR).log().mean()),
        nearest.cpu().numpy(),
    )


class _TrianglePass:
    """One walk over the pairs i <= j in blocks, and the sums that it leaves.

    Attributes:
        potential: ``sum_{j != i} g_ij`` of each image, float64 (N,).
        best: largest exponent ``-t |z_i - z_j|^2`` of each image, (N,).
        neighbors: the j that has it, int64 (N,).
        raw_max: largest exponent of the raw features.
        raw_sum: sum over pairs of ``exp(exponent - raw_max)`` of the raw features.
    """

    def __init__(self, rows: Tensor, norms: Tensor, t: float, dtype: torch.dtype) -> None:
        inverse = inverse_norms(norms)
        self.rows, self.t, self.dtype = rows, t, dtype
        self.inverse = inverse.to(dtype)
        self.unit = (t * (norms > 0)).to(dtype)  # t |z|^2, which is t, or 0 for a zero vector
        self.square = (t * norms.square()).to(dtype)
        self.potential = torch.zeros_like(norms)
        self.best = torch.full_like(self.unit, -math.inf)
        self.neighbors = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        self.raw_max, self.raw_sum = -math.inf, 0.0

    def run(self) -> _TrianglePass:
        """Walk over all blocks."""
        buffers = torch.empty(2, BLOCK * BLOCK, dtype=self.dtype, device=self.rows.device)
        n = len(self.rows)
        for i in range(0, n, BLOCK):
            left = self.rows[i : i + BLOCK].to(self.dtype)  # no copy of float32
            for j in range(i, n, BLOCK):
                right = self.rows[j : j + BLOCK].to(self.dtype)
                shape = (len(left), len(right))
                products, scores = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
                torch.mm(left, right.T, out=products)
                self._add_directions(products, scores, slice(i, i + shape[0]), slice(j, j + shape[1]))
                self._add_raw(products, slice(i, i + shape[0]), slice(j, j + shape[1]))
        return self

    def _add_directions(self, products: Tensor, scores: Tensor, rows: slice, columns: slice) -> None:
        """Kernel sums and nearest neighbours of unit-length features; ``scores`` is written over."""
        torch.mul(products, (2 * self.t) * self.inverse[rows, None], out=scores)
        scores.mul_(self.inverse[columns]).sub_(self.unit[columns]).sub_(self.unit[rows, None])
        if rows == columns:
            scores.fill_diagonal_(-math.inf)
        self._keep_nearest(scores, rows, columns.start)
        if rows != columns:
            self._keep_nearest(scores.T, columns, rows.start)
        scores.exp_()
        self.potential[rows] += scores.sum(dim=1)
        if rows != columns:
            self.potential[columns] += scores.sum(dim=0)

    def _keep_nearest(self, scores: Tensor, rows: slice, offset: int) -> None:
        """Neighbours of some rows where a block (rows, other images) has a better one; equal ones keep the first."""
        best = scores.amax(dim=1)
        better = (best > self.best[rows]).nonzero().squeeze(1)  # few after the first blocks: argmax costs ten amax
        if len(better):
            self.best[rows][better] = best[better]
            self.neighbors[rows][better] = scores[better].argmax(dim=1) + offset

    def _add_raw(self, products: Tensor, rows: slice, columns: slice) -> None:
        """Sum of the raw kernel, relative to its largest term so far; ``products`` is written over."""
        torch.add(-self.square[columns], products, alpha=2 * self.t, out=products)
        exponents = products.sub_(self.square[rows, None])
        if rows == columns:
            exponents.fill_diagonal_(-math.inf)
        largest = min(0.0, float(exponents.max()))  # rounding may make a squared distance negative
        if largest <= self.raw_max + NEGLIGIBLE:
            return
        if largest > self.raw_max:
            self.raw_sum, self.raw_max = self.raw_sum * math.exp(self.raw_max - largest), largest
        terms = exponents.sub_(self.raw_max).clamp_(NEGLIGIBLE, 0).exp_()
        # A diagonal block holds each of its pairs twice.
        self.raw_sum += float(terms.sum(dim=1).double().sum()) * (0.5 if rows == columns else 1.0)

    def uniformity(self) -> float:
        n = len(self.potential)
        # Rounding may put the mean above 1, that is U below 0, when all features are equal.
        return max(0.0, math.log(n * (n - 1)) - math.log(float(self.potential.sum())))

    def raw_uniformity(self) -> float:
        n = len(self.potential)
        return max(0.0, math.log(n * (n - 1) / 2) - (self.raw_max + math.log(self.raw_sum)))

    def vmf_entropy(self) -> float:
        return max(0.0, math.log(len(self.potential) - 1) - float(self.potential.log().mean()))


def _nearest_distances(found: _TrianglePass, norms: Tensor) -> Tensor:
    """Distance of each image's nearest neighbour, float64 (N,): from the products where those are exact enough."""
    inverse = inverse_norms(norms)
    distances = (-found.best.double() / found.t).clamp_(min=0).sqrt_()
    if found.dtype == torch.float32:
        for mine in _chunks(distances <= CLOSE):
            found.neighbors[mine] = _float64_neighbors(found.rows, inverse, mine)
    for mine in _chunks(distances <= FAR):
        other = found.neighbors[mine]
        difference = found.rows[mine].double().mul_(inverse[mine, None])
        difference -= found.rows[other].double().mul_(inverse[other, None])
        distances[mine] = difference.norm(dim=1)
    return distances


def _chunks(mask: Tensor) -> tuple[Tensor, ...]:
    """Indices of the true entries, at most BLOCK at a time; none where there is none."""
    chosen = mask.nonzero().squeeze(1)
    return chosen.split(BLOCK) if len(chosen) else ()


def _float64_neighbors(rows: Tensor, inverse: Tensor, mine: Tensor) -> Tensor:
    """Nearest neighbours among all images, int64 (M,), of a few images (M,), from float64 products."""
    left = rows[mine].double().mul_(inverse[mine, None])
    best = torch.full((len(mine),), -math.inf, dtype=torch.float64, device=rows.device)
    index = torch.zeros_like(mine)
    for start in range(0, len(rows), BLOCK):
        scale = inverse[start : start + BLOCK]
        right = rows[start : start + BLOCK].double().mul_(scale[:, None])
        # |z_i - z_j|^2 = |z_i|^2 + |z_j|^2 - 2 z_i.z_j; the first term is the same for all j.
        scores = torch.mm(left, right.T).mul_(2).sub_((scale > 0).double())
        scores[mine[:, None] == torch.arange(start, start + len(right), device=rows.device)] = -math.inf
        value, column = scores.max(dim=1)
        index = torch.where(value > best, column + start, index)
        best = torch.maximum(best, value)
    return index
