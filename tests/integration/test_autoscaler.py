"""Nodes join because work waits for them, and the commands see how far the cluster can grow."""

import json

import pytest

from tests.integration.fake_autoscaler import NodeType, autoscaling_cluster
from tests.integration.heads import run_python

pytestmark = pytest.mark.cluster

TYPES = {
    "data": NodeType({"CPU": 1}, max_workers=1, labels={"role": "data"}),
    "train": NodeType({"CPU": 2}, max_workers=2, labels={"role": "train"}),
}

DRIVER = """
import json
from rayjobs import cluster

info = cluster.connect()
cluster.check_resources(info, num_workers=2, cpus_per_worker=2, gpus_per_worker=0, uses_ray_data=True)
try:
    cluster.check_resources(info, num_workers=3, cpus_per_worker=2, gpus_per_worker=0, uses_ray_data=False)
    refused = ""
except ValueError as error:
    refused = str(error)

import ray

# These nodes share one machine and so one session folder: one may look for the code while another still unpacks it.
@ray.remote(max_retries=5, retry_exceptions=[ModuleNotFoundError])
def where(role):
    import rayjobs  # the code has arrived on the new node
    return role, ray.get_runtime_context().get_node_id()

placed = ray.get([
    where.options(num_cpus=cpus, label_selector={"role": role}).remote(role)
    for cpus, role in ((2, "train"), (2, "train"), (1, "data"))
])
cluster.shutdown()
print(json.dumps({
    "before": info.total("CPU"), "autoscaling": info.autoscaling, "multi": info.is_multi_node, "refused": refused,
    "concurrent": cluster.max_concurrent_trials(info, 1, {"CPU": 2}), "placed": placed,
}))
"""


def test_waiting_tasks_add_nodes_of_the_right_type():
    with autoscaling_cluster(TYPES) as head:
        found = json.loads(run_python(DRIVER, head.driver_environment()).splitlines()[-1])
    assert found["before"] == 0
    assert found["autoscaling"] is True
    assert found["multi"] is True
    assert found["concurrent"] == 2
    assert "can grow to 5 CPUs" in found["refused"]
    nodes = {role: {node for r, node in found["placed"] if r == role} for role in ("train", "data")}
    assert len(nodes["data"]) == 1
    assert 1 <= len(nodes["train"]) <= 2  # the second task may wait for the first node
    assert not nodes["data"] & nodes["train"]
