"""A sweep on a head and two worker nodes: every trial spans both."""

from __future__ import annotations

import pytest

from tests.integration.commands import environment, results_of, run
from tests.integration.test_sweep_command import options
from tests.rayjobs.conftest import write_images

pytestmark = pytest.mark.cluster


def test_trials_of_two_workers_span_two_nodes(tmp_path):
    from ray.cluster_utils import Cluster

    images = write_images(tmp_path / "tree")
    arguments = options(images, tmp_path, "nodes", "--methods", "exemplar_v2", "--num-trials", "1")
    arguments += ["--epochs", "2", "--num-workers", "2", "--cpus-per-worker", "1"]
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
        variables = environment(tmp_path, RAY_ADDRESS=cluster.address)
        run("sweep", arguments, variables, tmp_path / "log")
    finally:
        cluster.shutdown()
    results = results_of(tmp_path / "results" / "nodes")
    assert [t["outcome"] for t in results["trials"]] == ["finished"]
    assert results["best"]["config"]["train"]["num_workers"] == 2
