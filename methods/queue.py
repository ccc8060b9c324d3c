"""First-in-first-out ring of keys (MoCo, section 3.2) with the labels and image ids of the keys in lock-step."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from methods.collectives import all_gather_concat
from methods.contracts import MethodContext

__all__ = ["FeatureQueue", "QueueDtype", "validate_queue_dtype", "validate_queue_size"]

QueueDtype = Literal["fp32", "bf16"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Entries of the table that sorts most image ids out; 64 KiB of bool stay in a core's cache.
_ID_TABLE_SIZE = 2**16


class FeatureQueue(nn.Module):
    """Ring of `size` unit vectors; all of it is state (buffers), and no operation waits for the device.

    Attributes:
        keys: (size, dim) in float32 or bfloat16, unit vectors; random directions until the first round is full.
        index: int64 (size,), image id of each key; -1 = none.
        labels: int64 (size,), class of each key; -1 = unknown, equal to no class. None without labels.
        pointer: int64 (), the slot that is written next.
    """

    keys: Tensor
    index: Tensor
    labels: Tensor | None
    pointer: Tensor

    def __init__(
        self,
        size: int,
        dim: int,
        with_labels: bool = False,
        generator: torch.Generator | None = None,
        dtype: QueueDtype = "fp32",
    ) -> None:
        """Makes a queue of random unit vectors.

        Args:
            size: number of keys.
            dim: length of a key.
            with_labels: whether to keep the class of each key.
            generator: source of the first keys; None is a new generator with seed 0.
            dtype: what keys are stored in; bf16 halves the memory and rounds each component to 8 bits.
        """
        super().__init__()
        validate_queue_dtype(dtype)
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        keys = torch.randn(size, dim, generator=generator)
        keys /= keys.norm(dim=1, keepdim=True).clamp_min_(1e-12)  # in place: half a GiB at 1M keys
        self.register_buffer("keys", keys.to(_DTYPES[dtype]))
        self.register_buffer("index", torch.full((size,), -1))
        self.register_buffer("labels", torch.full((size,), -1) if with_labels else None)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self._staged: list[tuple[Tensor, Tensor]] = []

    @property
    def size(self) -> int:
        """Number of keys."""
        return len(self.keys)

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None, index: Tensor | None = None) -> None:
        """Overwrites the oldest keys.

        Args:
            keys: (N, dim) unit vectors in the order to write, N <= size; rounded to the queue's dtype.
            labels: int64 (N,), needed exactly when the queue keeps labels.
            index: int64 (N,), image ids; None writes -1.
        """
        if len(keys) > self.size:
            raise ValueError(f"{len(keys)} keys do not fit a queue of {self.size}; make the queue at least that large")
        if (labels is None) != (self.labels is None):
            raise ValueError("labels must be given exactly when the queue was made with with_labels=True")
        slots = (self.pointer + torch.arange(len(keys), device=self.pointer.device)) % self.size
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.index.index_copy_(0, slots, torch.full_like(slots, -1) if index is None else index)
        if labels is not None and self.labels is not None:
            self.labels.index_copy_(0, slots, labels)
        self.pointer.add_(len(keys)).remainder_(self.size)

    @torch.no_grad()
    def stage(self, keys: Tensor, labels: Tensor, index: Tensor, micro_step: int = 0) -> None:
        """Remembers the keys of one forward pass until ``enqueue_staged``.

        The queue must not change between the forward passes of one optimiser step: accumulated gradients would see
        other negatives than the full batch does.

        Args:
            keys: (B, dim) of this worker.
            labels: int64 (B,).
            index: int64 (B,), image ids.
            micro_step: number of the forward pass; 0 forgets what an abandoned step left.
        """
        if micro_step == 0:
            self._staged.clear()
        self._staged.append((keys.detach(), torch.stack([labels, index], dim=1)))

    @torch.no_grad()
    def enqueue_staged(self) -> None:
        """Writes the staged keys of all workers, in the order of the global batch (worker by worker).

        Every worker writes the same, so the queues stay equal, and one process writes what N processes write.
        """
        assert self._staged, "enqueue_staged() before stage()"
        keys, ids = (all_gather_concat(torch.cat(parts)) for parts in zip(*self._staged, strict=True))
        self._staged.clear()
        labels, index = ids.unbind(dim=1)
        self.enqueue(keys, labels if self.labels is not None else None, index)

    @torch.no_grad()
    def same_image_rate(self, index: Tensor) -> Tensor:
        """Share of the given image ids (B,) of which the queue holds an older key: a false negative; ()."""
        held = self.index
        if held.device.type == "cpu":
            # Only the few keys that share their low bits with an id of the batch are searched: with 1M keys the search
            # would take a noticeable part of the step. Not on a GPU, which would have to wait for their number.
            is_wanted = torch.zeros(_ID_TABLE_SIZE, dtype=torch.bool)
            is_wanted[index & (_ID_TABLE_SIZE - 1)] = True
            held = held[is_wanted.index_select(0, held & (_ID_TABLE_SIZE - 1))]
        # Searching the few ids of the batch for each key is 6 times faster than torch.isin, which sorts the queue.
        ids = index.sort().values
        slots = torch.searchsorted(ids, held).clamp_max_(len(ids) - 1)
        counts = torch.zeros_like(ids).index_add_(0, slots, (ids[slots] == held).to(ids.dtype))
        return (counts[torch.searchsorted(ids, index)] > 0).float().mean()


def validate_queue_dtype(queue_dtype: str) -> None:
    """Raises ``ValueError`` for a storage type that the queue does not have."""
    if queue_dtype not in _DTYPES:
        raise ValueError(f"queue_dtype={queue_dtype!r} is unknown. Use one of {', '.join(_DTYPES)}.")


def validate_queue_size(queue_size: int, context: MethodContext) -> None:
    """Raises ``ValueError`` unless the queue is a multiple of the global batch and no larger than the data set.

    A ring that is no multiple of the batch would wrap inside a batch (MoCo asserts the same); one that is larger than
    the data set holds old keys of the query's own image as negatives.
    """
    batch = context.global_batch_size
    largest = context.num_images // batch * batch
    if largest == 0:
        raise ValueError(
            f"the global batch of {batch} images is larger than the data set ({context.num_images} images), so no "
            "queue is possible. Use a smaller batch size."
        )
    if queue_size > context.num_images:
        raise ValueError(
            f"queue_size={queue_size} is larger than the data set ({context.num_images} images), so it would hold old "
            f"keys of the query's own image as negatives. Use at most {largest} (a multiple of the global batch of "
            f"{batch}), or more images."
        )
    if queue_size < 1 or queue_size % batch:
        below = queue_size // batch * batch
        nearest = [str(size) for size in (below, below + batch) if 0 < size <= largest]
        raise ValueError(
            f"queue_size={queue_size} is no positive multiple of the global batch of {batch} images. "
            f"Use {' or '.join(nearest or [str(batch)])}, or another batch size."
        )
