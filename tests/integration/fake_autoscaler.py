"""A cluster on this machine whose autoscaler really adds and removes nodes; the nodes are local processes.

Ray's own helper (``ray.cluster_utils.AutoscalingCluster``) reads a file that the wheel lacks and runs ``ray stop``. The
same fake provider works as an external one, with autoscaler v2.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.integration.heads import Head, running_head

__all__ = ["NodeType", "autoscaling_cluster"]

# The fake provider numbers its nodes upwards from this identity, and autoscaler v2 must find the head under it.
HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the name is fixed in the fake provider
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@dataclass(frozen=True)
class NodeType:
    """A kind of node that the autoscaler may add.

    Attributes:
        resources: what each node offers, under Ray's names.
        max_workers: at most so many of them.
        labels: Ray labels of the nodes.
    """

    resources: Mapping[str, float]
    max_workers: int
    labels: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def autoscaling_cluster(types: Mapping[str, NodeType], idle_seconds: float = 60) -> Iterator[Head]:
    """A head that takes no tasks and adds nodes of these types when tasks, actors or placement groups wait.

    Args:
        types: the kinds of nodes by name.
        idle_seconds: how long a node without work is kept.
    """

    def options(head: Head) -> dict[str, str]:
        path = head.folder / "autoscaling.json"
        path.write_text(json.dumps(_config(types, head.address, idle_seconds)))
        return {"autoscaling-config": str(path)}

    environment = {
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    with running_head(0, options, environment) as head:
        yield head


def _config(types: Mapping[str, NodeType], address: str, idle_seconds: float) -> dict[str, Any]:
    kinds: dict[str, Any] = {HEAD_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    for name, kind in types.items():
        kinds[name] = {
            "resources": dict(kind.resources),
            "labels": dict(kind.labels),
            "node_config": {},
            "min_workers": 0,
            "max_workers": kind.max_workers,
        }
    return {
        "cluster_name": "fake",
        "max_workers": sum(kind.max_workers for kind in types.values()),
        "upscaling_speed": 100,
        "idle_timeout_minutes": idle_seconds / 60,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
            "foreground_node_launch": True,
        },
        "available_node_types": kinds,
        "head_node_type": HEAD_TYPE,
        # Required by the loader although nothing is set up.
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
