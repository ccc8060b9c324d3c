"""Feature inversion as Ray tasks: each takes some images, loads the frozen backbone once and inverts them.

An inversion is minutes to an hour of work that needs nothing but a checkpoint and one picture, so the images are spread
over whatever nodes there are. A task that is lost with its node is run again on another one and gives the same result,
which depends on the seed, the row and the kind of machine, not on the order or on the other tasks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from evaluation.deep_image_prior import Inversion
from evaluation.inversion import InversionConfig, invert_in_groups
from rayjobs.checkpoint import load_backbone, local_directory

__all__ = ["invert_on_cluster"]

logger = logging.getLogger(__name__)

MAX_RETRIES = 10  # of a task whose node or process was lost; errors of the code itself are not tried again


def invert_on_cluster(
    checkpoint: str,
    images: np.ndarray,
    rows: Sequence[int],
    config: InversionConfig,
    seed: int,
    *,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    batch: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> Iterator[tuple[int, Inversion]]:
    """Invert images on the nodes of the connected cluster; the signature of ``evaluation.inversion.InversionExecutor``.

    Args:
        checkpoint: checkpoint folder or URI that every node reaches.
        images: uint8 (n, 3, S, S), RGB.
        rows: n row numbers, which decide noise and first weights.
        config: the settings.
        seed: of noise and first weights.
        num_cpus: CPU cores, and so threads, of a task.
        num_gpus: GPUs of a task; a fraction lets tasks share one.
        batch: images per task, rounded up to a multiple of ``config.images_at_once`` so that the groups, and with them
            the results, do not depend on it; 0 takes one group: the most parallel, and the least work to lose with a
            node.
        on_progress: gets a line whenever a task is done; default: the log.

    Yields:
        Position and result of every image, tasks in the order in which they finish. When the caller stops early (an
        interrupt), the tasks that are still waiting or running are cancelled.

    Raises:
        ValueError: what ``invert_images`` or the checkpoint raised on a node.
    """
    import ray

    say = on_progress or logger.info
    remote = ray.remote(num_cpus=num_cpus, num_gpus=num_gpus, max_retries=MAX_RETRIES, retry_exceptions=False)(_invert)
    group = config.images_at_once
    size = max(1, -(-batch // group)) * group
    device = "cuda" if num_gpus else "cpu"

    def submit(start: int) -> Any:
        chosen = slice(start, start + size)
        return remote.remote(checkpoint, images[chosen], list(rows[chosen]), config, seed, num_cpus, device)

    starts = {submit(start): start for start in range(0, len(rows), size)}
    pending, finished = list(starts), 0
    try:
        while pending:
            (done,), pending = ray.wait(pending, num_returns=1)
            results: list[Inversion] = ray.get(done)
            finished += len(results)
            say(f"inversion: {finished} of {len(rows)} images done")
            yield from enumerate(results, starts.pop(done))  # popped: the object store may drop the task's result
    finally:
        for task in pending:
            ray.cancel(task, force=True)


def _invert(
    checkpoint: str,
    images: np.ndarray,
    rows: list[int],
    config: InversionConfig,
    seed: int,
    num_cpus: float,
    device: str,
) -> list[Inversion]:
    """The work of one task, in its worker process; the device is named because Ray may show GPUs to any task."""
    import torch

    torch.set_num_threads(max(1, int(num_cpus)))
    with local_directory(checkpoint) as directory:
        backbone: Any = load_backbone(directory)[0]
    return [result for _, result in invert_in_groups(backbone.to(device), images, rows, config, seed)]
