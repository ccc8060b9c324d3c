"""A Ray head as a user would start it, on ports and in a folder of its own, and its clean end.

Unlike ``ray stop``, which ends every cluster of the user, the end touches only processes of this head's session: other
clusters on the machine go on.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray._private.services import psutil  # Ray's own copy
from ray.util import get_node_ip_address

__all__ = ["ROOT", "Head", "free_ports", "run_python", "running_head", "start_cluster"]

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 180  # 10 s on an idle machine
START_ATTEMPTS = 3  # Ray gives its own node 30 s, which a busy machine can exceed
OBJECT_STORE_BYTES = 100 * 2**20


@dataclass(frozen=True)
class Head:
    """Where a running head is reached.

    Attributes:
        address: host:port of the control service: what a driver joins.
        dashboard: http address that takes jobs.
        folder: Ray's temporary folder of this cluster alone; logs are below it.
    """

    address: str
    dashboard: str
    folder: Path

    def driver_environment(self, **more: str) -> dict[str, str]:
        """The environment in which a command joins this cluster."""
        return {**os.environ, "RAY_ADDRESS": self.address, **more}


@contextmanager
def running_head(
    num_cpus: int,
    more_options: Callable[[Head], Mapping[str, str]] | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Head]:
    """Start ``ray start --head``, wait until it takes jobs, and end it with all that belongs to it.

    Args:
        num_cpus: logical CPUs of the head node.
        more_options: further options of ``ray start`` without the dashes, given where the head will be.
        environment: further environment variables of the head, which its workers inherit.
    """
    # Sockets below it must stay under 108 characters, which pytest's own folders do not.
    folder = Path(tempfile.mkdtemp(prefix="ray"))
    # Jobs run the `python` that the head finds on its PATH.
    variables = {**os.environ, **(environment or {})}
    variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
    try:
        for _ in range(START_ATTEMPTS):
            ports = free_ports(5)
            head = Head(f"{get_node_ip_address()}:{ports[0]}", f"http://127.0.0.1:{ports[1]}", folder)
            fault = _start(
                head, ports, {"num-cpus": num_cpus, **(more_options(head) if more_options else {})}, variables
            )
            if not fault:
                break
            _end(folder)
        assert not fault, f"the Ray head did not start in {START_ATTEMPTS} attempts:\n{fault}"
        yield head
    finally:
        _end(folder)
        shutil.rmtree(folder, ignore_errors=True)


def start_cluster(*nodes: Mapping[str, Any]) -> Any:
    """A ``ray.cluster_utils.Cluster`` of these nodes (keyword arguments of ``add_node``), the head first."""
    from ray.cluster_utils import Cluster

    for attempt in range(START_ATTEMPTS):
        cluster = Cluster()
        try:
            for options in nodes:
                cluster.add_node(**options)
            return cluster
        except Exception as error:
            cluster.shutdown()
            if "timed out during startup" not in str(error) or attempt + 1 == START_ATTEMPTS:
                raise
    raise AssertionError


def run_python(code: str, environment: Mapping[str, str], timeout: float = 420) -> str:
    """Run a driver of its own process from the project's root and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def free_ports(count: int) -> list[int]:
    """Different ports that nothing listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("", 0))
        return [probe.getsockname()[1] for probe in probes]


def _start(head: Head, ports: Sequence[int], more_options: Mapping[str, object], environment: Mapping[str, str]) -> str:
    """Start the head's processes and wait until it takes jobs; returns what went wrong, or nothing."""
    options = {
        "port": ports[0],
        "dashboard-host": "127.0.0.1",
        "dashboard-port": ports[1],
        "dashboard-agent-listen-port": ports[2],
        "metrics-export-port": ports[3],
        "ray-client-server-port": ports[4],
        "temp-dir": head.folder,
        "object-store-memory": OBJECT_STORE_BYTES,
        **more_options,
    }
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head"]
    command += [f"--{name}={value}" for name, value in options.items()]
    log = head.folder / "head.log"
    with log.open("w") as output:  # not a pipe: the head's processes would keep it open when the command fails
        started = subprocess.run(command, env=environment, stdout=output, stderr=output, timeout=START_SECONDS)
    if started.returncode != 0:
        return log.read_text()[-3000:]
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        try:
            # The dashboard answers before it knows of a node that can take a driver.
            with urllib.request.urlopen(f"{head.dashboard}/api/v0/nodes", timeout=5) as reply:
                if b'"ALIVE"' in reply.read():
                    return ""
        except OSError:
            pass
        time.sleep(0.3)
    return f"no node in {START_SECONDS} s; see {head.folder}"


def _end(folder: Path) -> None:
    """End everything that names the cluster's folder, with the children (fake nodes outlive the head)."""
    ours = _processes_of(folder)
    for end in (psutil.Process.terminate, psutil.Process.kill):
        for process in ours | _processes_of(folder):
            with suppress(psutil.NoSuchProcess):
                end(process)
        _, alive = psutil.wait_procs(list(ours), timeout=10)
        ours = set(alive)
    assert not ours, f"processes of the cluster survived: {ours}"


def _processes_of(folder: Path) -> set[psutil.Process]:
    found: set[psutil.Process] = set()
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(folder) in word for word in process.cmdline()):
                found |= {process, *process.children(recursive=True)}
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found
