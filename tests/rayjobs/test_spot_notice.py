"""The spot watcher against a metadata service that behaves like EC2's, and its command against Ray's own parser."""

import json
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from rayjobs import spot_notice

TOKEN = "the-token"


class Metadata(BaseHTTPRequestHandler):
    """Version 2 of the service: a token first; the item exists only once an interruption is announced."""

    notice: dict[str, str] | None = None

    def answer(self, status: int, body: str = "") -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def do_PUT(self) -> None:
        asked = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
        self.answer(*((200, TOKEN) if asked else (400, "")))

    def do_GET(self) -> None:
        if self.headers.get("X-aws-ec2-metadata-token") != TOKEN:
            self.answer(401)
        elif self.path != "/latest/meta-data/spot/instance-action" or self.notice is None:
            self.answer(404)
        else:
            self.answer(200, json.dumps(self.notice))

    def log_message(self, format: str, *args: Any) -> None:
        """Silent."""


@pytest.fixture
def service() -> Iterator[tuple[str, type[Metadata]]]:
    handler = type("Handler", (Metadata,), {})
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def announced(seconds: float) -> dict[str, str]:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return {"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}


def test_no_notice_then_a_notice_with_the_time_left(service):
    url, handler = service
    assert spot_notice.seconds_left(url) is None
    handler.notice = announced(90)
    left = spot_notice.seconds_left(url)
    assert left is not None
    assert 80 < left <= 90
    handler.notice = announced(-5)
    assert spot_notice.seconds_left(url) == 0.0


def test_the_node_is_drained_once_and_a_silent_service_only_reported(capsys):
    looks: list[Any] = [None, OSError("no route"), 77.0, 50.0]
    drained: list[float] = []

    def look() -> float | None:
        value = looks.pop(0)
        if isinstance(value, OSError):
            raise value
        return value

    spot_notice.watch(look, drained.append, poll_seconds=0)
    assert drained == [77.0]
    assert looks == [50.0]
    assert "no route" in capsys.readouterr().err


def test_ray_understands_the_drain_command():
    from ray.scripts.scripts import cli

    program, name, *arguments = spot_notice.drain_command(119.7)
    assert program == "ray"
    command = cli.commands[name]
    context = command.make_context(name, list(arguments))
    assert context.params["reason"] == "DRAIN_NODE_REASON_PREEMPTION"
    assert context.params["deadline_remaining_seconds"] == 119
    assert context.params["node_id"] is None  # Ray then takes the node that it runs on


def test_the_script_needs_nothing_but_the_standard_library():
    """The image carries this one file."""
    lines = Path(spot_notice.__file__).read_text().splitlines()
    modules = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert modules <= set(sys.stdlib_module_names)
