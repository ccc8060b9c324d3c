"""`ray job submit --working-dir .` to a running head: code arrives, the driver joins, the status comes back."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.integration.heads import ROOT, Head

pytestmark = pytest.mark.commands


def submit(
    head: Head, entry_point: Sequence[str], options: Sequence[str] = (), timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Submit as a user does, wait for the end, and return status and output."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", head.dashboard]
    command += ["--working-dir", str(ROOT), *options, "--", *entry_point]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_job_joins_the_cluster_with_the_code_that_was_sent(head: Head, tmp_path: Path):
    result = tmp_path / "result.json"
    code = f"""
import json, os
from rayjobs import cluster
info = cluster.connect()
import ray
@ray.remote
def worker():
    import rayjobs.capacity
    names = ("RAY_ADDRESS", "TUNE_GLOBAL_CHECKPOINT_S", "RAY_DATA_USE_DATASOURCE_V2")
    return rayjobs.capacity.__file__, {{name: os.environ.get(name) for name in names}}
path, variables = ray.get(worker.remote())
json.dump([info.address, info.started_here, os.getcwd(), path, variables], open({str(result)!r}, "w"))
"""
    # A variable of the job's own: the driver repeats none of those, which Ray would refuse.
    own = ["--runtime-env-json", json.dumps({"env_vars": {"TUNE_GLOBAL_CHECKPOINT_S": "7"}})]
    script = tmp_path / "driver.py"
    script.write_text(code)
    done = submit(head, ["python", str(script)], own)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    address, started_here, folder, path, variables = json.loads(result.read_text())
    assert address == head.address
    assert started_here is False
    assert Path(folder) != ROOT, "the job runs in the copy that was sent"
    assert str(head.folder) in path, "so do its workers"
    assert variables == {
        "RAY_ADDRESS": head.address,
        "TUNE_GLOBAL_CHECKPOINT_S": "7",
        "RAY_DATA_USE_DATASOURCE_V2": "0",
    }


def test_the_status_of_a_failed_job_comes_back(head: Head, tmp_path: Path):
    script = tmp_path / "driver.py"
    script.write_text("import sys; print('ran'); sys.exit(3)")
    done = submit(head, ["python", str(script)])
    assert done.returncode == 1
    assert "ran\n" in done.stdout, done.stderr[-2000:]
    assert "failed with exit code 3" in (done.stdout + done.stderr)
