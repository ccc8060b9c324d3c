"""What fits on a cluster: the nodes it has, those it may grow to, and how many training workers they hold.

Ray waits for ever for workers that fit nowhere, so that the commands ask here before they start any. No Ray import.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

__all__ = [
    "ClusterInfo",
    "NodeGroup",
    "Placement",
    "check_resources",
    "full_size",
    "head_resource",
    "max_concurrent_trials",
    "placement",
    "worker_slots",
]

logger = logging.getLogger(__name__)

HEAD_RESOURCE: Final = "node:__internal_head__"


@dataclass(frozen=True)
class NodeGroup:
    """``count`` nodes that each offer ``resources`` (Ray's names: CPU, GPU, ...) and carry ``labels``."""

    resources: Mapping[str, float]
    count: int = 1
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ClusterInfo:
    """What the commands need to know about the cluster they run on.

    Attributes:
        address: host:port of the cluster's control service.
        dashboard_url: http address of the Ray dashboard; empty when there is none.
        nodes: the nodes that are alive now, the head included.
        started_here: this process started the cluster, and shutting down ends it.
        autoscaling: nodes may be added on demand.
        full_size: the nodes of the cluster grown to its limit; None when that is unknown or equals ``nodes``.
    """

    address: str
    dashboard_url: str
    nodes: tuple[NodeGroup, ...]
    started_here: bool = False
    autoscaling: bool = False
    full_size: tuple[NodeGroup, ...] | None = None

    @property
    def is_multi_node(self) -> bool:
        """Whether paths must be on shared storage: several nodes now, or possibly later."""
        return self.autoscaling or sum(group.count for group in self.nodes) > 1

    @property
    def largest(self) -> tuple[NodeGroup, ...]:
        """The cluster at its known limit."""
        return self.full_size or self.nodes

    def total(self, resource: str) -> float:
        """How much of a resource the nodes offer that are alive now."""
        return _total(self.nodes, resource)


@dataclass(frozen=True)
class Placement:
    """Node labels of where work runs; None is anywhere.

    Attributes:
        train: of training and evaluation.
        data: of Ray Data's tasks.
    """

    train: dict[str, str] | None = None
    data: dict[str, str] | None = None


def head_resource() -> dict[str, float]:
    """Resource request that pins an actor or trial driver to the head, which is never a spot node, at no cost."""
    return {HEAD_RESOURCE: 0.001}


def check_resources(
    info: ClusterInfo, num_workers: int, cpus_per_worker: float, gpus_per_worker: float, uses_ray_data: bool
) -> None:
    """Refuse training workers that the cluster can never place, and warn when it has to grow first.

    Ray would wait for ever in both cases that are refused: workers that fit no node, and workers that leave no CPU for
    the Ray Data tasks that feed them.

    Args:
        info: the cluster.
        num_workers: data-parallel workers of one run.
        cpus_per_worker: CPUs that each reserves.
        gpus_per_worker: GPUs that each reserves.
        uses_ray_data: whether images arrive through Ray Data, which needs a CPU that no worker reserves.

    Raises:
        ValueError: the request exceeds what the cluster has, or can grow to.
    """
    need = {"CPU": cpus_per_worker, "GPU": gpus_per_worker}
    asked = f"{num_workers} workers x ({cpus_per_worker:g} CPU, {gpus_per_worker:g} GPU)"
    asked += " + 1 CPU for Ray Data" if uses_ray_data else ""
    if _fits(info.nodes, num_workers, need, uses_ray_data):
        return
    if info.autoscaling and info.full_size is None:
        logger.warning("Asked for %s; now there are %s. Waiting for nodes to be added.", asked, _text(info.nodes))
        return
    if not _fits(info.largest, num_workers, need, uses_ray_data):
        limit = "can grow to" if info.autoscaling else "has"
        raise ValueError(
            f"Not enough resources: asked for {asked}, but the cluster at {info.address} {limit} "
            f"{_text(info.largest)}. A worker must fit on one node. Ask for fewer workers (--num-workers), for fewer "
            "CPUs each (--cpus-per-worker; fractions are allowed), or use a larger cluster."
        )
    logger.warning("Asked for %s; now there are %s. The cluster has to grow first.", asked, _text(info.nodes))


def max_concurrent_trials(info: ClusterInfo, num_workers: int, resources_per_worker: Mapping[str, float]) -> int:
    """How many trials of ``num_workers`` workers run at once on the cluster at its full size; at least one.

    Tune does not see what a trial reserves inside, so that without this limit every trial would start and they would
    block each other.
    """
    groups = _of_role(info.largest, "train")
    return max(1, worker_slots(groups, resources_per_worker) // max(1, num_workers))


def placement(info: ClusterInfo) -> Placement:
    """Training on nodes labelled ``role: train``, Ray Data on ``role: data``, wherever a cluster has such nodes.

    ``cluster.yaml`` labels its nodes so; on a laptop everything runs everywhere.
    """
    groups = (*info.nodes, *info.largest)

    def selector(role: str) -> dict[str, str] | None:
        return {"role": role} if any(group.labels.get("role") == role for group in groups) else None

    return Placement(selector("train"), selector("data"))


def _of_role(groups: Sequence[NodeGroup], role: str) -> Sequence[NodeGroup]:
    """The nodes that work of this role may use: those with its label, or all where no node has it."""
    return [group for group in groups if group.labels.get("role") == role] or groups


def worker_slots(groups: Sequence[NodeGroup], need: Mapping[str, float]) -> int:
    """How many workers with these needs the nodes hold; a worker cannot be split over nodes."""
    return sum(group.count * _slots(group.resources, need) for group in groups)


def full_size(nodes: Sequence[NodeGroup], config: Mapping[str, Any]) -> tuple[NodeGroup, ...]:
    """The cluster grown to the limits of an autoscaler configuration: an upper bound.

    Args:
        nodes: the nodes alive now; the head is the one with Ray's head resource.
        config: the document that ``ray start --autoscaling-config`` was given.
    """
    head = tuple(group for group in nodes if HEAD_RESOURCE in group.resources)
    limit = int(config.get("max_workers", 2))  # Ray's default
    grown = [
        NodeGroup(kind.get("resources", {}), min(limit, int(kind.get("max_workers", limit))), kind.get("labels", {}))
        for name, kind in config.get("available_node_types", {}).items()
        if name != config.get("head_node_type")
    ]
    return head + tuple(group for group in grown if group.count > 0)


def _slots(resources: Mapping[str, float], need: Mapping[str, float]) -> int:
    """How many workers fit one node."""
    # The small term keeps 1 CPU / 0.1 CPU at ten workers in spite of binary fractions.
    per_kind = [math.floor(resources.get(k, 0) / v + 1e-6) for k, v in need.items() if v > 0]
    return min(per_kind, default=10**6)


def _fits(groups: Sequence[NodeGroup], workers: int, need: Mapping[str, float], uses_ray_data: bool) -> bool:
    """Whether the workers can be placed, packed node by node as Ray does, with a whole CPU left for Ray Data."""
    left, spare = workers, 0
    training, data = _of_role(groups, "train"), _of_role(groups, "data")
    for group in groups:
        for _ in range(group.count):
            here = min(left, _slots(group.resources, need)) if group in training else 0
            left -= here
            if group in data:
                spare += math.floor(group.resources.get("CPU", 0) - here * need.get("CPU", 0) + 1e-6)
    return left == 0 and (spare >= 1 or not uses_ray_data)


def _total(groups: Sequence[NodeGroup], resource: str) -> float:
    return sum(group.count * group.resources.get(resource, 0) for group in groups)


def _text(groups: Sequence[NodeGroup]) -> str:
    """For messages: totals, then the nodes one by one."""
    each = ", ".join(
        f"{group.count} x {group.resources.get('CPU', 0):g} CPU/{group.resources.get('GPU', 0):g} GPU"
        for group in groups
    )
    return f"{_total(groups, 'CPU'):g} CPUs and {_total(groups, 'GPU'):g} GPUs (nodes: {each or 'none'})"
