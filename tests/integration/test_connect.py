"""`connect` without a cluster to join: a private one, complete and protected; one without dashboard is refused."""

import json
import os

import pytest

from tests.integration.heads import ROOT, run_python

pytestmark = pytest.mark.cluster

DRIVER = """
import json, os
from pathlib import Path
from rayjobs import cluster

info = cluster.connect(num_cpus=3)
import ray

@ray.remote
def worker():
    import rayjobs.capacity
    names = ("RAY_ADDRESS", "PYTHONPATH", "RAY_DATA_USE_DATASOURCE_V2", "RAY_AUTH_MODE", "OMP_NUM_THREADS")
    return rayjobs.capacity.__file__, {name: os.environ.get(name) for name in names}

path, variables = ray.get(worker.options(num_cpus=2).remote())
pinned = ray.get(ray.remote(lambda: 1).options(num_cpus=0, resources=cluster.head_resource()).remote())
again = cluster.connect()
cluster.shutdown()

ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="error", log_to_driver=False)
try:
    cluster.connect()
    refused = ""
except ValueError as error:
    refused = str(error)
cluster.shutdown()
cluster.shutdown()
print(json.dumps({
    "address": info.address, "again": again.address, "dashboard": info.dashboard_url, "cpus": info.total("CPU"),
    "own": info.started_here, "multi": info.is_multi_node, "path": path, "variables": variables, "pinned": pinned,
    "refused": refused, "token_written": (Path.home() / ".ray" / "auth_token").exists(),
}))
"""


def test_a_private_cluster_is_complete_and_protected(tmp_path):
    unset = ("RAY_AUTH_MODE", "RAY_ADDRESS", "OMP_NUM_THREADS", "RAY_DATA_USE_DATASOURCE_V2")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    found = json.loads(run_python(DRIVER, {**environment, "HOME": str(tmp_path)}).splitlines()[-1])
    assert found["own"] is True
    assert found["multi"] is False
    assert found["cpus"] == 3
    assert found["pinned"] == 1
    assert found["again"] == found["address"], "a connected process keeps its connection"
    assert found["dashboard"].startswith("http://")
    assert found["path"] == str(ROOT / "rayjobs" / "capacity.py")
    assert found["variables"]["RAY_ADDRESS"] == found["address"]
    assert found["variables"]["RAY_DATA_USE_DATASOURCE_V2"] == "0"
    assert found["variables"]["OMP_NUM_THREADS"] == "2", "Ray's own default: the CPUs that the worker reserved"
    assert found["variables"]["RAY_AUTH_MODE"] == "token", "Ray listens on every interface"
    assert found["token_written"] is False
    assert "ray[default]" in found["refused"]
