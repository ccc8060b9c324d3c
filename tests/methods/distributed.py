"""Runs a function in several processes that share a gloo process group."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

__all__ = ["run_processes"]


def _worker(rank: int, fn: Callable[..., Any], world_size: int, folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = Path(folder) / "store"
    dist.init_process_group("gloo", init_method=store.as_uri(), rank=rank, world_size=world_size)
    try:
        torch.save(fn(*args), Path(folder) / f"result_{rank}.pt")
        dist.barrier()  # a worker that ends early would break the others' last collective
    finally:
        dist.destroy_process_group()


def run_processes(fn: Callable[..., Any], world_size: int, tmp_path: Path, *args: Any) -> list[Any]:
    """Calls ``fn(*args)`` in `world_size` new processes with one thread each and a gloo group over a file.

    Args:
        fn: a function at module level (it is pickled). It finds its rank with ``methods.collectives.rank()``.
        world_size: number of processes.
        tmp_path: folder for the rendezvous and the results; several calls may share it.
        args: picklable arguments.

    Returns:
        What `fn` returned on each rank, in rank order: tensors and plain containers (saved with ``torch.save``).
    """
    folder = tmp_path / uuid.uuid4().hex
    folder.mkdir(parents=True)
    # Forked from a server that imports once what takes seconds (DDP needs torch._dynamo): clean but cheap processes.
    mp.get_context("forkserver").set_forkserver_preload(["torch._dynamo", "methods"])
    mp.start_processes(_worker, (fn, world_size, str(folder), args), nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=True) for rank in range(world_size)]
