"""cluster.yaml and Dockerfile, validated without an account: Ray's schema, EC2's own model, and what neither sees."""

import copy
import re
from pathlib import Path
from typing import Any

import botocore.loaders
import botocore.model
import botocore.validate
import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

ROOT = Path(__file__).resolve().parents[2]
MEMORY_GIB = {"m7i.2xlarge": 32, "m7i.8xlarge": 128, "g5.4xlarge": 64}
CORES_AND_GPUS = {"m7i.8xlarge": (32, 0), "g5.4xlarge": (16, 1)}


@pytest.fixture
def config() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture(scope="module")
def ec2() -> botocore.model.ServiceModel:
    return botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("ec2", "service-2"), "ec2")


def ray_faults(config: dict[str, Any]) -> str:
    """What Ray itself refuses; it validates before and after it fills in the defaults."""
    try:
        validate_config(config)
        validate_config(prepare_config(copy.deepcopy(config)))
    except (jsonschema.ValidationError, ValueError, AssertionError) as error:
        return str(error).splitlines()[0]
    return ""


def ec2_faults(config: dict[str, Any], ec2: botocore.model.ServiceModel) -> str:
    """What EC2 would refuse in the launch requests, as far as its published model tells."""
    shape = ec2.operation_model("RunInstances").input_shape
    known = ec2.shape_for("InstanceType").enum
    faults = []
    for name, kind in config["available_node_types"].items():
        request = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        faults.append(botocore.validate.ParamValidator().validate(request, shape).generate_report())
        if request["InstanceType"] not in known:
            faults.append(f"{name}: unknown InstanceType {request['InstanceType']}")
        market = request.get("InstanceMarketOptions", {}).get("MarketType", "spot")
        if market not in ec2.shape_for("MarketType").enum:
            faults.append(f"{name}: unknown MarketType {market}")
    return "\n".join(filter(None, faults))


def own_faults(config: dict[str, Any]) -> list[str]:
    """What no schema sees."""
    kinds = config["available_node_types"]
    workers = {name: kind for name, kind in kinds.items() if name != config["head_node_type"]}
    faults = [f"{n}: min > max" for n, k in workers.items() if k["min_workers"] > k["max_workers"]]
    if sum(kind["max_workers"] for kind in workers.values()) != config["max_workers"]:
        faults.append("max_workers is not the sum over the types")
    if kinds[config["head_node_type"]]["resources"] != {"CPU": 0}:
        faults.append("the head takes tasks")
    for name, kind in workers.items():
        offered = kind["resources"]
        if (offered["CPU"], offered.get("GPU", 0)) != CORES_AND_GPUS[kind["node_config"]["InstanceType"]]:
            faults.append(f"{name}: resources are not those of the instance type")
        if ("GPU" in offered) != ("InstanceMarketOptions" in kind["node_config"]):
            faults.append(f"{name}: GPU nodes, and only they, are spot nodes")
        if kind["labels"] != {"role": "train" if "GPU" in offered else "data"}:
            faults.append(f"{name}: wrong role")
    return faults + shm_faults(config)


def shm_faults(config: dict[str, Any]) -> list[str]:
    """Ray's object store takes 30 % of the memory and must fit /dev/shm."""
    faults = []
    for name, kind in config["available_node_types"].items():
        own = kind.get("docker", {}).get("worker_run_options", [])
        options = config["docker"]["head_run_options"] if name == config["head_node_type"] else own
        sizes = re.findall(r"--shm-size=(\d+)g", " ".join(options))
        memory = MEMORY_GIB[kind["node_config"]["InstanceType"]]
        if len(sizes) != 1 or not 0.3 * memory <= int(sizes[0]) <= 0.4 * memory:
            faults.append(f"{name}: shm size {sizes} does not suit {memory} GiB")
    return faults


def test_the_file_is_valid_at_every_level(config, ec2):
    assert ray_faults(config) == ""
    assert ec2_faults(config, ec2) == ""
    assert own_faults(config) == []


@pytest.mark.parametrize(
    ("path", "value", "level"),
    [
        (("idle_timeout_minuts",), 5, "ray"),
        (("head_node_type",), "haed", "ray"),
        (("docker", "imgae"), "x", "ray"),
        (("available_node_types", "gpu_spot", "max_worker"), 3, "ray"),
        (("available_node_types", "gpu_spot", "resources", "GPU"), "one", "ray"),
        (("available_node_types", "gpu_spot", "node_config", "InstanceTyp"), "g5.4xlarge", "ec2"),
        (("available_node_types", "gpu_spot", "node_config", "InstanceType"), "g5.5xlarge", "ec2"),
        (("available_node_types", "gpu_spot", "node_config", "InstanceMarketOptions", "MarketType"), "spott", "ec2"),
        (("available_node_types", "head", "node_config", "BlockDeviceMappings", 0, "Ebs", "VolumeSize"), "200", "ec2"),
        (("available_node_types", "gpu_spot", "min_workers"), 9, "own"),
        (("max_workers",), 4, "own"),
        (("available_node_types", "data_cpu", "resources", "CPU"), 16, "own"),
        (("available_node_types", "data_cpu", "docker", "worker_run_options", 0), "--shm-size=64m", "own"),
        (("available_node_types", "gpu_spot", "labels", "role"), "data", "own"),
    ],
)
def test_a_typo_is_caught(config, ec2, path, value, level):
    config = copy.deepcopy(config)  # anchors of the file share objects; a copy keeps that and spares the fixture
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    found = {
        "ray": lambda: ray_faults(config),
        "ec2": lambda: ec2_faults(config, ec2),
        "own": lambda: own_faults(config),
    }
    assert found[level]()


def test_image_is_of_the_installed_ray_and_python(config):
    base = re.search(r"^FROM rayproject/ray:(\S+)-py3(\d+)-gpu$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert base, "the base image carries Ray's version and Python's"
    assert base[1] == ray.__version__
    assert f"ray=={base[1]}\n" in (ROOT / "requirements.txt").read_text()
    assert config["docker"]["image"].endswith(f":ray{base[1]}-py3{base[2]}")
    assert f"--python-version 3.{base[2]}" in (ROOT / "Makefile").read_text()


def test_every_file_that_the_image_copies_reaches_docker():
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    admitted = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    files = [name for line in copied for name in line.split()]
    assert sorted(files) == sorted(admitted)
    assert all((ROOT / name).is_file() for name in files)


def test_boto_pins_of_the_image_exist():
    wanted = re.search(r"grep -E '(.+?)'", (ROOT / "Dockerfile").read_text())
    assert wanted
    pins = [line for line in (ROOT / "requirements-test.txt").read_text().splitlines() if re.match(wanted[1], line)]
    assert [pin.split("==")[0] for pin in pins] == ["boto3", "botocore", "jmespath", "s3transfer"]


def test_services_that_the_nodes_start(config):
    """MLflow is reachable for workers under the address they are told, spot nodes are watched, threads are not cut."""
    head = " ".join(config["head_start_ray_commands"])
    worker = " ".join(config["worker_start_ray_commands"])
    assert "--workers 1" in head
    assert "--allowed-hosts" in head
    for commands in (head, worker):
        assert "MLFLOW_TRACKING_URI=http://" in commands
        assert commands.index("unset OMP_NUM_THREADS") < commands.index("ray start ")
        assert commands.index("MLFLOW_TRACKING_URI") < commands.index("ray start ")
    assert "spot_notice.py --address $RAY_HEAD_IP:6379" in worker
