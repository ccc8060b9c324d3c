"""One Ray cluster inside the tests' process, another as a user starts it, and a check that no test leaves resources
behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.heads import Head, running_head, start_cluster

REPOSITORY = str(Path(__file__).parents[2])
RELEASE_SECONDS = 30  # a stopped trial's placement group is removed by a poller, within a few seconds
_FORWARDED = ("RAY_DATA_", "RAY_TRAIN_", "TUNE_", "OMP_")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """A head node with 4 logical CPUs and the dashboard, which removes the placement groups of stopped trials."""
    import ray

    head = {"num_cpus": 4, "object_store_memory": 200 * 2**20, "include_dashboard": True, "dashboard_port": 0}
    cluster = start_cluster(head)
    forwarded = {name: value for name, value in os.environ.items() if name.startswith(_FORWARDED)}
    ray.init(
        address=cluster.address,
        logging_level="error",
        log_to_driver=False,
        runtime_env={"env_vars": {**forwarded, "RAY_ADDRESS": cluster.address, "PYTHONPATH": REPOSITORY}},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def head() -> Iterator[Head]:
    """A head started from the command line, which the commands under test join; 3 logical CPUs."""
    with running_head(num_cpus=3) as running:
        yield running


@pytest.fixture(autouse=True)
def no_leaked_cpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test on the session's cluster all CPUs are free again."""
    yield
    if "ray_cluster" not in request.fixturenames:
        return
    import ray

    deadline = time.monotonic() + RELEASE_SECONDS
    while (left := _missing_cpus(ray)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, f"the test left {left:g} CPUs reserved: a placement group, actor or task was not released"


def _missing_cpus(ray: Any) -> float:
    return ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
