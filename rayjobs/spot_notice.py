"""Tells Ray that this EC2 spot node is about to be taken away: two minutes' warning instead of a dead worker.

EC2 announces an interruption in the instance metadata; nothing in Ray 2.60 reads it there. ``cluster.yaml`` starts
this script beside ``ray start``. On a notice it drains the node with the reason "preemption": Ray schedules nothing new
on it, and Ray Train restarts the run from its checkpoint elsewhere without charging its failure limit.

Standard library only: the image carries this one file, because a job's code is not there yet when a node starts.

    python spot_notice.py --address HEAD_IP:6379
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import UTC, datetime

__all__ = ["drain_command", "seconds_left", "watch"]

# Link-local address of the instance metadata service on every EC2 instance.
METADATA_URL = "http://169.254.169.254"
# AWS asks for a look every 5 s: https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html
POLL_SECONDS = 5.0


def seconds_left(metadata_url: str = METADATA_URL, timeout: float = 2.0) -> float | None:
    """Seconds until the instance is stopped or terminated; None as long as that is not announced.

    Raises:
        OSError: the metadata service does not answer.
    """
    ask_token = urllib.request.Request(
        f"{metadata_url}/latest/api/token", method="PUT", headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    )
    with urllib.request.urlopen(ask_token, timeout=timeout) as reply:
        token = reply.read().decode()
    ask = urllib.request.Request(
        f"{metadata_url}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token}
    )
    try:
        with urllib.request.urlopen(ask, timeout=timeout) as reply:
            notice = json.load(reply)
    except urllib.error.HTTPError as error:
        if error.code == 404:  # the item exists only once an interruption is announced
            return None
        raise
    end = datetime.strptime(notice["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return max(0.0, (end - datetime.now(UTC)).total_seconds())


def drain_command(seconds: float) -> list[str]:
    """The Ray command that drains the node it runs on."""
    return [
        *("ray", "drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
        *("--reason-message", "EC2 spot interruption", "--deadline-remaining-seconds", str(int(seconds))),
    ]


def watch(look: Callable[[], float | None], drain: Callable[[float], None], poll_seconds: float = POLL_SECONDS) -> None:
    """Look until an interruption is announced, then drain once.

    Args:
        look: seconds left, or None; an OSError is reported and the next look tried.
        drain: called with the seconds left.
        poll_seconds: pause between looks.
    """
    while True:
        try:
            seconds = look()
        except OSError as error:
            print(f"spot notice: the instance metadata does not answer: {error}", file=sys.stderr, flush=True)
            seconds = None
        if seconds is not None:
            print(f"spot notice: this node ends in {seconds:.0f} s; draining it", file=sys.stderr, flush=True)
            return drain(seconds)
        time.sleep(poll_seconds)


def main() -> None:
    """Watch until the end of this node."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--address", required=True, help="HOST:PORT of the head that this node joined")
    address = parser.parse_args().address
    # Without --node-id Ray drains the node that the command runs on; RAY_ADDRESS keeps it from finding another cluster.
    environment = {**os.environ, "RAY_ADDRESS": address}
    watch(seconds_left, lambda seconds: subprocess.run(drain_command(seconds), env=environment, check=True) and None)


if __name__ == "__main__":
    main()
