"""The one way from a command to a Ray cluster, and the guards that stop a doomed job before it starts.

``connect`` joins the cluster that ``RAY_ADDRESS`` names (job submission sets it for the driver) or starts a private
one on this machine, and hands every worker the environment that measurements asked for:

- ``RAY_ADDRESS`` reaches the workers. Ray gives it to a job's driver only, and a worker that looks for the cluster by
  itself may find another one on the same machine; then the placement groups of stopped trials are never freed.
- The V1 Parquet reader: the V2 reader makes one task of a small data set and starts footer readers every epoch.
- Code: a job brings its working directory, a private cluster shares the checkout, any other cluster gets an upload.

Ray is imported inside the functions: several of these variables count only when they are set before the import.
"""

from __future__ import annotations

import json
import logging
import math
import os
import secrets
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rayjobs.capacity import (
    ClusterInfo,
    NodeGroup,
    check_resources,
    full_size,
    head_resource,
    max_concurrent_trials,
    placement,
)

if TYPE_CHECKING:
    from rayjobs.configs import TrainConfig  # imports torch, which joining a cluster does not need

__all__ = [
    "ClusterInfo",
    "NodeGroup",
    "check_address",
    "check_dashboard",
    "check_resources",
    "connect",
    "connect_for",
    "head_resource",
    "max_concurrent_trials",
    "placement",
    "shutdown",
    "worker_environment",
]

logger = logging.getLogger(__name__)

PROJECT_ROOT: Final = Path(__file__).resolve().parents[1]

# Set unless the user chose otherwise.
DRIVER_DEFAULTS: Final[Mapping[str, str]] = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Workers that a private cluster starts ahead lack our environment: seconds of imports for processes nobody uses.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DATA_USE_DATASOURCE_V2": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    # Otherwise every pass over a split prints its execution plan.
    "RAY_DATA_LOG_LEVEL": "ERROR",
    # Workers print nothing themselves; the patch would double what a library prints.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # Keep CUDA_VISIBLE_DEVICES of tasks without GPUs as it is: Ray's coming default, and no warning.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The commands print their own lines; Tune's newer output ignores verbose=0.
    "RAY_AIR_NEW_OUTPUT": "0",
    # The objective is reported once, at the end of a trial: intermediate reports lack it (rayjobs/ray_tune.py).
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # Seconds between saves of the sweep's state; the end of a trial is saved at once.
    "TUNE_GLOBAL_CHECKPOINT_S": "30",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
# Ray Train's default of 60 s is below what a cloud needs to launch a node.
LOCAL_START_TIMEOUT_S: Final = "180"
JOINED_START_TIMEOUT_S: Final = "900"

# OMP_NUM_THREADS goes along only when the user set it: otherwise Ray sets it to the CPUs of each worker.
# MLFLOW_EXPERIMENT_ID and MLFLOW_RUN_ID must not leak into workers, and the runtime environment is readable in the
# dashboard, so that passwords and tokens have to be on the nodes already.
FORWARDED_PREFIXES: Final = (
    "RAY_DATA_",
    "RAY_TRAIN_",
    "TUNE_",
    "OMP_NUM_THREADS",
    "PRETRANSFER_",
    "MLFLOW_HTTP_REQUEST_",
)
FORWARDED_NAMES: Final = (
    "MLFLOW_S3_ENDPOINT_URL",
    "MLFLOW_TRACKING_URI",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
)

JOB_CONFIG: Final = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray's own variable; set in the driver of a submitted job


def connect(num_cpus: int | None = None) -> ClusterInfo:
    """Join the cluster of ``RAY_ADDRESS``, or start a private one on this machine.

    Call it before anything else imports Ray. A process that is already connected keeps its connection.

    Args:
        num_cpus: logical CPUs of a private cluster; None takes the number of cores. A cluster that is joined keeps
            its own.

    Raises:
        ValueError: ``RAY_ADDRESS`` cannot be joined, or the cluster's dashboard does not answer.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    address = "" if address == "local" else address  # Ray's own word for "start one here"
    if address:
        check_address(address)
    for name, value in DRIVER_DEFAULTS.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault(
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", JOINED_START_TIMEOUT_S if address else LOCAL_START_TIMEOUT_S
    )
    import ray

    started_here = False
    if not ray.is_initialized():
        _remove_stale_address_file()
        started_here = not address
        if started_here:
            _start(num_cpus)
        else:
            _join(address)
    info = _describe(started_here)
    check_dashboard(info)
    _warn_of_other_clusters(info.address)
    return info


def connect_for(settings: TrainConfig, uses_ray_data: bool) -> ClusterInfo:
    """Connect for one run; a private cluster gets the logical CPUs that its workers and Ray Data ask for.

    Raises:
        ValueError: as ``connect``, or the cluster can never place the run.
    """
    wanted = math.ceil(settings.num_workers * settings.cpus_per_worker + uses_ray_data)
    info = connect(None if settings.use_gpu else max(os.cpu_count() or 1, wanted))
    gpus = float(settings.use_gpu)
    check_resources(info, settings.num_workers, settings.cpus_per_worker, gpus, uses_ray_data)
    return info


def shutdown() -> None:
    """Leave the cluster; a private one ends with it. Harmless when not connected."""
    import ray

    if ray.is_initialized():
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address that a driver cannot join, with the reason.

    Raises:
        ValueError: an address of another kind, or one where nothing listens.
    """
    if address.startswith(("http://", "https://", "ray://")):
        raise ValueError(
            f"RAY_ADDRESS is {address!r}. That address takes submitted jobs or Ray clients; a command that runs in "
            "this shell needs HOST:PORT of the control service. Submit instead, `ray job submit --address "
            f"{address if address.startswith('http') else 'http://127.0.0.1:8265'} --working-dir . -- python ...`, "
            "or unset RAY_ADDRESS to run on this machine."
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(
            f"RAY_ADDRESS is {address!r}. Name the cluster as HOST:PORT, for instance 10.0.0.5:6379, or unset "
            "RAY_ADDRESS to run on this machine."
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(
            f"No Ray cluster answers at RAY_ADDRESS={address} ({error}). Start it (`ray start --head`), correct the "
            "address, or unset RAY_ADDRESS to run on this machine."
        ) from error


def check_dashboard(info: ClusterInfo) -> None:
    """Refuse a cluster whose dashboard does not answer.

    Ray Train frees the CPUs and GPUs of a stopped trial by asking the dashboard's state service. Without it they stay
    reserved, and the sweep waits for them for ever. The question asked here is the one that Ray Train asks later.

    Raises:
        ValueError: no dashboard, or one that belongs to another cluster.
    """
    reason = "the cluster was started without one" if not info.dashboard_url else _dashboard_fault(info)
    if reason:
        raise ValueError(
            f"The dashboard of the Ray cluster at {info.address} does not answer: {reason}. Trials that are stopped "
            "early would keep their CPUs and GPUs for ever. Install it on the head with `pip install 'ray[default]'` "
            "and start the head without `--include-dashboard=false`."
        )


def worker_environment(environ: Mapping[str, str], address: str) -> dict[str, str]:
    """The environment variables that every worker gets, from the driver's.

    Ray refuses a variable that a job's own runtime environment already sets, and workers have those anyway.
    """
    chosen = {k: v for k, v in environ.items() if k.startswith(FORWARDED_PREFIXES) or k in FORWARDED_NAMES}
    chosen["RAY_ADDRESS"] = address
    of_job = _job_runtime_env(environ).get("env_vars", {})
    return {name: value for name, value in chosen.items() if name not in of_job}


def _start(num_cpus: int | None) -> None:
    """Start a private cluster on this machine.

    Ray's processes listen on every interface, so token authentication (Ray's default for new local clusters) stays on.
    The token is one of our own for this process tree: Ray would write one into the home directory, which from then on
    switches authentication on for every `ray start` there while `ray job submit` does not read it. The control
    service's port is chosen here because the workers' environment has to name it before Ray starts.
    """
    import ray
    from ray.util import get_node_ip_address

    user_token = Path.home() / ".ray" / "auth_token"
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ) and not user_token.exists():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    address = f"{get_node_ip_address()}:{port}"
    variables = worker_environment(os.environ, address)
    if _is_checkout():
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT_ROOT), os.environ.get("PYTHONPATH")]))
    os.environ["RAY_GCS_SERVER_PORT"] = str(port)
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=True,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": variables},
        )
    finally:
        del os.environ["RAY_GCS_SERVER_PORT"]
    actual = ray.get_runtime_context().gcs_address
    assert actual == address, f"The workers were told {address}, but the cluster is at {actual}"


def _join(address: str) -> None:
    """Join a running cluster; its authentication is the user's affair and left as it is."""
    import ray

    runtime_env: dict[str, Any] = {"env_vars": worker_environment(os.environ, address)}
    if JOB_CONFIG not in os.environ and _is_checkout():
        runtime_env["working_dir"] = str(PROJECT_ROOT)
    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=runtime_env)


def _describe(started_here: bool) -> ClusterInfo:
    """Read the state of the cluster that this process is connected to."""
    import ray
    from ray._private.worker import get_dashboard_url

    address = ray.get_runtime_context().gcs_address
    nodes = tuple(
        NodeGroup(dict(node["Resources"]), labels=dict(node["Labels"])) for node in ray.nodes() if node["Alive"]
    )
    dashboard = get_dashboard_url()
    managed = any("ray.io/node-group" in node["Labels"] for node in ray.nodes() if node["Alive"])
    config = None if started_here else _autoscaler_config(address)
    return ClusterInfo(
        address=address,
        dashboard_url=f"http://{dashboard}" if dashboard else "",
        nodes=nodes,
        started_here=started_here,
        # KubeRay names the group of every node but keeps its limits to itself.
        autoscaling=config is not None or (managed and not started_here),
        full_size=full_size(nodes, config) if config is not None else None,
    )


def _autoscaler_config(address: str) -> dict[str, Any] | None:
    """The autoscaler's configuration, if it runs on this machine (drivers of submitted jobs do run on the head).

    Ray publishes the limits nowhere, so they are read from the file that the monitor process was started with.
    """
    import psutil  # Ray ships it
    import yaml

    option = "--autoscaling-config="
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if not any(a.endswith("monitor.py") for a in arguments) or f"--gcs-address={address}" not in arguments:
            continue
        for path in (a.removeprefix(option) for a in arguments if a.startswith(option)):
            return yaml.safe_load(Path(path).expanduser().read_text())
    return None


def _dashboard_fault(info: ClusterInfo) -> str:
    """Why the dashboard's state service cannot be used; empty when it can."""
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException

    try:
        listed = {vars(node)["node_id"] for node in list_nodes(address=info.address, timeout=30)}
    except RayStateApiException as error:
        return str(error).splitlines()[0]
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    return "" if listed & alive else f"{info.dashboard_url} is the dashboard of another cluster"


def _warn_of_other_clusters(address: str) -> None:
    from ray._private.services import find_gcs_addresses

    others = sorted(find_gcs_addresses() - {address})
    if others:
        logger.warning(
            "Another Ray cluster runs on this machine (%s): both believe that all cores and memory are theirs.",
            ", ".join(others),
        )


def _remove_stale_address_file() -> None:
    """Delete the note of a dead head on where it was reachable.

    A head that was killed leaves it behind. Whatever looks for "the" cluster then waits for one that is gone, 12 s per
    trial of a sweep.
    """
    from ray._common.utils import get_ray_address_file

    path = Path(get_ray_address_file(None))
    if not path.is_file():
        return
    host, _, port = path.read_text().strip().rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
    except ConnectionRefusedError:
        logger.warning("Removed %s: the Ray cluster that it names (%s:%s) no longer runs.", path, host, port)
        path.unlink(missing_ok=True)
    except (OSError, ValueError) as error:
        logger.warning("%s names a Ray cluster that cannot be asked (%s); delete it if it is gone.", path, error)


def _job_runtime_env(environ: Mapping[str, str]) -> dict[str, Any]:
    """The runtime environment that the job was submitted with; empty outside of jobs."""
    return json.loads(environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}


def _is_checkout() -> bool:
    """Whether the code runs from a checkout; an installed package is on every node already (and has no root)."""
    return (PROJECT_ROOT / "pyproject.toml").is_file()
