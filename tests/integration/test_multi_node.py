"""A sweep on a head and two worker nodes: every trial spans both."""

from __future__ import annotations

import pytest

from tests.integration.commands import environment, results_of, run
from tests.integration.heads import start_cluster
from tests.integration.test_sweep_command import options
from tests.rayjobs.conftest import write_images

pytestmark = pytest.mark.cluster


def test_trials_of_two_workers_span_two_nodes(tmp_path):
    images = write_images(tmp_path / "tree")
    arguments = options(images, tmp_path, "nodes", "--methods", "exemplar_v2", "--num-trials", "1")
    arguments += ["--epochs", "2", "--num-workers", "2", "--cpus-per-worker", "1"]
    head = {"num_cpus": 0, "object_store_memory": 100 * 2**20, "include_dashboard": True, "dashboard_port": 0}
    node = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = start_cluster(head, node, node)
    try:
        variables = environment(tmp_path, RAY_ADDRESS=cluster.address)
        run("sweep", arguments, variables, tmp_path / "log")
    finally:
        cluster.shutdown()
    results = results_of(tmp_path / "results" / "nodes")
    assert [t["outcome"] for t in results["trials"]] == ["finished"]
    assert results["best"]["config"]["train"]["num_workers"] == 2
