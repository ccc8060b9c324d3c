"""Exact nearest neighbours by cosine similarity among millions of feature vectors, in bounded memory.

All similarities are computed in float32, one block of queries against one block of the bank at a time, and each query
keeps its best k. The bank is read in blocks and brought to unit length block by block, so it may lie on disk
(``numpy.memmap``) and is never copied as a whole. At 2048 dimensions the products take nearly all the time; below 256
finding the best k among them does, which on a CPU is why:

  - a query has room for 2 k candidates. Only products above its k-th best so far are added (after the first blocks
    very few), 32 products are compared at once, and the candidates are cut back to k when the room is full: the
    thresholded reservoir of faiss, in one pass over products that are still in the cache;
  - of equal similarities the smaller row of the bank stays.

Other devices use their own top-k per block. faiss itself (``IndexFlatIP``, which copies the bank) is a second backend.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numba import njit
from torch import Tensor

from evaluation.feature_blocks import as_tensor, inverse_norms, row_norms, warn_of_zero_rows

__all__ = ["Neighbors", "UnitRows", "faiss_neighbors", "nearest_neighbors"]

GROUP = 32  # products compared at once: two cache lines
LARGEST_SCALE = 3e38  # of float32; a shorter vector than its inverse stays shorter than 1


class Blocks(NamedTuple):
    """How much is worked on at once.

    Attributes:
        query_chunk: queries for which the bank is read once.
        query_block: queries of one matrix product.
        bank_block: rows of the bank of one matrix product.
    """

    query_chunk: int
    query_block: int
    bank_block: int


# One product is 8 MB and a bank block at 2048 dimensions 32 MB: together they fit a last-level cache.
HOST_BLOCKS = Blocks(4096, 512, 4096)
DEVICE_BLOCKS = Blocks(65_536, 4096, 32_768)


class Neighbors(NamedTuple):
    """The k nearest rows of the bank for consecutive queries, in no order.

    Attributes:
        first: number of the first query.
        similarity: cosine, float32 (Q, k).
        rows: int64 (Q, k).
    """

    first: int
    similarity: Tensor
    rows: Tensor


class UnitRows:
    """Rows of features at unit length, made block by block; the features are neither changed nor copied."""

    def __init__(self, x: np.ndarray, split: str) -> None:
        """Read the rows once for their lengths.

        Args:
            x: float32 (N, D), also a memory map; a zero row stays zero and is warned about.
            split: named in the warning.
        """
        self.rows = as_tensor(x)
        norms = row_norms(self.rows)
        warn_of_zero_rows(norms, split, stacklevel=2)
        self._scales = inverse_norms(norms).clamp_(max=LARGEST_SCALE).float()

    def __len__(self) -> int:
        return len(self.rows)

    def block(self, start: int, stop: int) -> Tensor:
        """Some rows, float32, in memory of their own."""
        return self.rows[start:stop] * self._scales[start:stop, None]


class _Best(Protocol):
    """The best candidates of some queries so far."""

    def offer(self, products: Tensor, query: int, row: int) -> None:
        """Similarities (Q, N) of the queries from number ``query`` on to the rows from number ``row`` on."""
        ...

    def result(self) -> tuple[Tensor, Tensor]:
        """Similarities and rows (Q, k)."""
        ...


def nearest_neighbors(bank: UnitRows, queries: UnitRows, k: int, device: str = "cpu") -> Iterator[Neighbors]:
    """All queries in order, some thousands at a time.

    Args:
        bank: N rows.
        queries: rows of the same width.
        k: at most N.
        device: where to compute.
    """
    on_host = torch.device(device).type == "cpu"
    sizes = HOST_BLOCKS if on_host else DEVICE_BLOCKS
    # New memory for each product would cost as much as a quarter of a product of 128 dimensions.
    memory = torch.empty(sizes.query_block * min(sizes.bank_block, len(bank)), device=device)
    for first in range(0, len(queries), sizes.query_chunk):
        chunk = queries.block(first, first + sizes.query_chunk).to(device)
        best: _Best = HostBest(len(chunk), k) if on_host else DeviceBest(len(chunk), k, device)
        for row in range(0, len(bank), sizes.bank_block):
            block = bank.block(row, row + sizes.bank_block).to(device)
            for query in range(0, len(chunk), sizes.query_block):
                part = chunk[query : query + sizes.query_block]
                products = memory[: len(part) * len(block)].view(len(part), len(block))
                best.offer(torch.mm(part, block.T, out=products), query, row)
        yield Neighbors(first, *best.result())


def faiss_neighbors(bank: UnitRows, queries: UnitRows, k: int) -> Iterator[Neighbors]:
    """The same from faiss's exact inner-product index, which holds a copy of the bank.

    Raises:
        ValueError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "backend 'faiss' needs the package faiss, which is not installed. Install it (pip install faiss-cpu) or "
            "use backend 'blocks'."
        ) from error
    index = faiss.IndexFlatIP(bank.rows.shape[1])
    for row in range(0, len(bank), HOST_BLOCKS.bank_block):
        index.add(bank.block(row, row + HOST_BLOCKS.bank_block).numpy())
    for first in range(0, len(queries), HOST_BLOCKS.query_chunk):
        similarity, rows = index.search(queries.block(first, first + HOST_BLOCKS.query_chunk).numpy(), k)
        yield Neighbors(first, torch.from_numpy(similarity), torch.from_numpy(rows))


class DeviceBest:
    """Running top-k with the device's own."""

    def __init__(self, num_queries: int, k: int, device: str) -> None:
        self.k = k
        self.similarity = torch.full((num_queries, k), -torch.inf, device=device)
        self.rows = torch.zeros(num_queries, k, dtype=torch.int64, device=device)

    def offer(self, products: Tensor, query: int, row: int) -> None:
        """Keep the best of what is known and what is new."""
        mine = slice(query, query + len(products))
        new, index = products.topk(min(self.k, products.shape[1]), dim=1, sorted=False)
        similarity = torch.cat([self.similarity[mine], new], dim=1)
        rows = torch.cat([self.rows[mine], index + row], dim=1)
        self.similarity[mine], kept = similarity.topk(self.k, dim=1, sorted=False)
        self.rows[mine] = rows.gather(1, kept)

    def result(self) -> tuple[Tensor, Tensor]:
        """Similarities and rows (Q, k)."""
        return self.similarity, self.rows


class HostBest:
    """Room for 2 k candidates per query, filled by compiled code with as many threads as torch uses."""

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.similarity = np.empty((num_queries, 2 * k), np.float32)
        self.rows = np.empty((num_queries, 2 * k), np.int64)
        self.count = np.zeros(num_queries, np.int64)
        self.threshold = np.full(num_queries, -np.inf, np.float32)
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def offer(self, products: Tensor, query: int, row: int) -> None:
        """Add what is above each query's threshold."""
        values = products.numpy()

        def collect(part: slice) -> None:
            mine = slice(query + part.start, query + part.stop)
            state = (self.similarity[mine], self.rows[mine], self.count[mine], self.threshold[mine])
            _collect(values[part], row, self.k, *state)

        edges = np.linspace(0, len(values), self.threads + 1).astype(int).tolist()
        list(self.pool.map(collect, map(slice, edges[:-1], edges[1:])))

    def result(self) -> tuple[Tensor, Tensor]:
        """Similarities and rows (Q, k); every query has been offered at least k rows."""
        self.pool.shutdown()
        _cut_all(self.similarity, self.rows, self.count, self.k)
        return torch.from_numpy(self.similarity[:, : self.k]), torch.from_numpy(self.rows[:, : self.k])


# All compiled functions are in one file: numba's disk cache does not notice a change in a callee of another file.


@njit(nogil=True, cache=True)
def _collect(products, first_row, k, similarity, rows, count, threshold):
    """Append what exceeds each query's threshold; a full query is cut to its best k, which raises its threshold."""
    room = similarity.shape[1]
    for i in range(products.shape[0]):
        row, values, names, n, limit = products[i], similarity[i], rows[i], count[i], threshold[i]
        for begin in range(0, row.shape[0], GROUP):
            group = row[begin : begin + GROUP]
            above = 0
            for j in range(group.shape[0]):  # counting has no branch, so it is compiled to vector instructions
                above += group[j] > limit
            if above == 0:
                continue
            for j in range(group.shape[0]):
                if group[j] > limit:
                    if n == room:
                        n, limit = k, _cut(values, names, k)
                        if group[j] <= limit:
                            continue
                    values[n], names[n] = group[j], first_row + begin + j
                    n += 1
        count[i], threshold[i] = n, limit


@njit(nogil=True, cache=True)
def _cut_all(similarity, rows, count, k):
    """Leave the best k of each query at the front."""
    for i in range(similarity.shape[0]):
        _cut(similarity[i, : count[i]], rows[i], k)


@njit(nogil=True, cache=True)
def _cut(values, rows, k):
    """Move the k largest values and their rows to the front, in their order; returns the smallest of them.

    Of values that equal the smallest, the first ones stay.
    """
    limit = _kth_largest(values.copy(), k)
    larger = 0
    for j in range(values.shape[0]):
        larger += values[j] > limit
    equal_left, n = k - larger, 0
    for j in range(values.shape[0]):
        if values[j] < limit or (values[j] == limit and equal_left == 0):
            continue
        if values[j] == limit:
            equal_left -= 1
        values[n], rows[n] = values[j], rows[j]
        n += 1
    return limit


@njit(nogil=True, cache=True)
def _kth_largest(values, k):
    """Hoare's selection; reorders the values."""
    low, high = 0, values.shape[0] - 1
    while low < high:
        pivot = values[(low + high) // 2]
        i, j = low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return values[k - 1]
