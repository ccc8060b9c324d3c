"""Joining a cluster: addresses, worker environments and resource arithmetic, without starting Ray.

``tests/integration/test_connect.py`` starts one.
"""

import json
import logging
import socket

import pytest

from rayjobs import capacity, cluster
from rayjobs.capacity import (
    ClusterInfo,
    NodeGroup,
    Placement,
    check_resources,
    full_size,
    max_concurrent_trials,
    placement,
    worker_slots,
)

HEAD = NodeGroup({"CPU": 0, capacity.HEAD_RESOURCE: 1.0})
CONFIG = {
    "max_workers": 6,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 0}},
        "data": {"max_workers": 2, "resources": {"CPU": 32}},
        "train": {
            "min_workers": 0,
            "max_workers": 8,
            "resources": {"CPU": 16, "GPU": 1},
            "labels": {"role": "train"},
        },
    },
}


def fixed(*nodes: NodeGroup) -> ClusterInfo:
    return ClusterInfo("10.0.0.1:6379", "http://10.0.0.1:8265", nodes)


def growing(full: tuple[NodeGroup, ...] | None) -> ClusterInfo:
    return ClusterInfo("10.0.0.1:6379", "http://10.0.0.1:8265", (HEAD,), autoscaling=True, full_size=full)


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://host", "ray://host:10001", "auto", "host", ":1"])
def test_addresses_of_another_kind_are_refused_with_the_way_out(address):
    with pytest.raises(ValueError, match="unset RAY_ADDRESS") as error:
        cluster.check_address(address)
    assert repr(address) in str(error.value)


def test_an_address_counts_when_something_listens_there():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        with pytest.raises(ValueError, match="No Ray cluster answers"):
            cluster.check_address(f"127.0.0.1:{port}")
        server.listen()
        cluster.check_address(f"127.0.0.1:{port}")


def test_connect_refuses_before_it_imports_or_starts_anything(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "7")
    with pytest.raises(ValueError, match=r"ray job submit --address http://127.0.0.1:8265"):
        cluster.connect()


def test_workers_get_the_address_and_the_settings_but_no_secret_and_no_active_run():
    environ = {
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "30",
        "OMP_NUM_THREADS": "2",
        "MLFLOW_TRACKING_URI": "http://head:5000",
        "MLFLOW_TRACKING_PASSWORD": "secret",
        "MLFLOW_EXPERIMENT_ID": "7",
        "MLFLOW_RUN_ID": "8",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HOME": "/home/me",
    }
    assert cluster.worker_environment(environ, "10.0.0.1:6379") == {
        "RAY_ADDRESS": "10.0.0.1:6379",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "30",
        "OMP_NUM_THREADS": "2",
        "MLFLOW_TRACKING_URI": "http://head:5000",
    }


def test_variables_of_the_submitted_job_are_left_to_ray():
    """Ray refuses a driver that repeats a variable of its job."""
    from ray.runtime_env import RuntimeEnv
    from ray.runtime_env.runtime_env import _merge_runtime_env

    of_job = {"env_vars": {"TUNE_GLOBAL_CHECKPOINT_S": "5"}, "working_dir": "gcs://x.zip"}
    environ = {
        cluster.JOB_CONFIG: json.dumps({"runtime_env": of_job, "metadata": {}}),
        "TUNE_GLOBAL_CHECKPOINT_S": "5",
        "RAY_DATA_X": "1",
    }
    ours = cluster.worker_environment(environ, "a:1")
    assert ours == {"RAY_ADDRESS": "a:1", "RAY_DATA_X": "1"}
    merged = _merge_runtime_env(RuntimeEnv(env_vars=of_job["env_vars"]), RuntimeEnv(env_vars=ours))
    assert merged is not None
    assert merged["env_vars"] == {"TUNE_GLOBAL_CHECKPOINT_S": "5", **ours}


def test_a_job_without_a_runtime_environment_is_understood():
    environ = {cluster.JOB_CONFIG: json.dumps({"runtime_env": None})}
    assert cluster.worker_environment(environ, "a:1") == {"RAY_ADDRESS": "a:1"}


@pytest.mark.parametrize(
    ("cpus", "workers", "per_worker", "uses_ray_data", "possible"),
    [
        (2, 2, 1.0, False, True),
        (2, 2, 1.0, True, False),  # the hang that Ray gives one warning line for
        (2, 1, 1.0, True, True),
        (2, 2, 0.5, True, True),
        (4, 3, 1.0, True, True),
        (4, 1, 5.0, False, False),
        (1, 10, 0.1, False, True),  # ten tenths are one CPU in spite of binary fractions
    ],
)
def test_workers_and_ray_data_must_fit(cpus, workers, per_worker, uses_ray_data, possible):
    info = fixed(NodeGroup({"CPU": cpus, capacity.HEAD_RESOURCE: 1.0}))
    if possible:
        check_resources(info, workers, per_worker, 0, uses_ray_data)
        return
    with pytest.raises(ValueError, match="asked for") as error:
        check_resources(info, workers, per_worker, 0, uses_ray_data)
    assert f"{workers} workers x ({per_worker:g} CPU" in str(error.value)
    assert f"has {cpus} CPUs and 0 GPUs" in str(error.value)


def test_a_worker_cannot_be_split_over_nodes():
    info = fixed(NodeGroup({"CPU": 2}), NodeGroup({"CPU": 2}))
    check_resources(info, 2, 2, 0, uses_ray_data=False)
    with pytest.raises(ValueError, match="must fit on one node"):
        check_resources(info, 1, 3, 0, uses_ray_data=False)
    # 3 + 3 CPUs, two workers of 2 leave 1 + 1: enough for Ray Data, and one more worker would not fit
    info = fixed(NodeGroup({"CPU": 3}), NodeGroup({"CPU": 3}))
    check_resources(info, 2, 2, 0, uses_ray_data=True)
    with pytest.raises(ValueError, match="Not enough"):
        check_resources(info, 3, 2, 0, uses_ray_data=False)


def test_gpus_are_checked_too():
    with pytest.raises(ValueError, match=r"1 workers x \(1 CPU, 1 GPU\).*0 GPUs"):
        check_resources(fixed(NodeGroup({"CPU": 8})), 1, 1, 1, uses_ray_data=False)


def test_a_cluster_that_can_grow_only_warns_up_to_its_limit(caplog):
    info = growing(full_size((HEAD,), CONFIG))
    with caplog.at_level(logging.WARNING):
        check_resources(info, 6, 8, 1, uses_ray_data=True)
    assert "has to grow first" in caplog.text
    with pytest.raises(ValueError, match="can grow to 160 CPUs and 6 GPUs"):
        check_resources(info, 7, 8, 1, uses_ray_data=False)


def test_a_cluster_that_grows_to_an_unknown_size_only_warns(caplog):
    with caplog.at_level(logging.WARNING):
        check_resources(growing(None), 100, 8, 1, uses_ray_data=True)
    assert "Waiting for nodes" in caplog.text


def test_full_size_is_the_head_and_the_limits_of_the_worker_types():
    grown = full_size((HEAD, NodeGroup({"CPU": 32})), CONFIG)  # the worker that is up counts once, in its type
    assert grown == (HEAD, NodeGroup({"CPU": 32}, 2), NodeGroup({"CPU": 16, "GPU": 1}, 6, {"role": "train"}))


def test_concurrent_trials_follow_the_workers_that_fit():
    info = fixed(NodeGroup({"CPU": 3}), NodeGroup({"CPU": 3}))
    assert worker_slots(info.nodes, {"CPU": 2}) == 2
    assert max_concurrent_trials(info, 1, {"CPU": 1}) == 6
    assert max_concurrent_trials(info, 1, {"CPU": 2}) == 2  # not 6 // 2: a worker stays on one node
    assert max_concurrent_trials(info, 2, {"CPU": 1, "GPU": 0}) == 3
    assert max_concurrent_trials(info, 4, {"CPU": 1}) == 1
    assert max_concurrent_trials(growing(full_size((HEAD,), CONFIG)), 2, {"CPU": 8, "GPU": 1}) == 3
    assert max_concurrent_trials(fixed(HEAD), 1, {"CPU": 1}) == 1


def test_work_goes_to_nodes_of_its_role_where_there_are_such():
    assert placement(fixed(NodeGroup({"CPU": 2}))) == Placement()
    data = NodeGroup({"CPU": 2}, labels={"role": "data"})
    assert placement(fixed(data)) == Placement(data={"role": "data"})
    info = growing(full_size((HEAD,), CONFIG))
    assert placement(info) == Placement(train={"role": "train"})
    train = NodeGroup({"CPU": 4}, labels={"role": "train"})
    both = fixed(data, train)
    assert max_concurrent_trials(both, 1, {"CPU": 1}) == 4, "training does not use the data node"
    check_resources(both, 4, 1, 0, uses_ray_data=True)
    with pytest.raises(ValueError, match="Not enough"):
        check_resources(both, 5, 1, 0, uses_ray_data=False)


def test_multi_node_means_now_or_later():
    one = NodeGroup({"CPU": 2})
    assert not fixed(one).is_multi_node
    assert fixed(one, one).is_multi_node
    assert growing(None).is_multi_node


def test_stale_address_files_go_and_live_ones_stay(monkeypatch, tmp_path):
    note = tmp_path / "ray_current_cluster"
    monkeypatch.setattr("ray._common.utils.get_ray_address_file", lambda _: str(note))
    cluster._remove_stale_address_file()  # no file: nothing to do
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        note.write_text(f"127.0.0.1:{server.getsockname()[1]}")
        cluster._remove_stale_address_file()
        assert note.exists()
    cluster._remove_stale_address_file()
    assert not note.exists()


def test_a_cluster_without_dashboard_is_refused():
    with pytest.raises(ValueError, match=r"ray\[default\]"):
        cluster.check_dashboard(ClusterInfo("10.0.0.1:6379", "", (HEAD,)))
