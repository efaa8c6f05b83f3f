"""Waits on a ZenML server over REST, as a team has it: several processes, answers through the server's API, no launch of workloads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import requests

from kitaru_zenml_stacks import loopback

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.server


class Remote:
    """Processes of a user who is logged in to the server."""

    def __init__(self, server: loopback.Server, folder: Path) -> None:
        self.server, self.effects = server, folder / "effects"
        self.env = {**os.environ, **server.client_env(folder / "client"), "EFFECTS": str(self.effects)}
        self.effects.touch()

    def python(self, code: str) -> Any:
        """Run code in a process of its own; what it assigns to `answer`."""
        imports = "import json\nfrom kitaru_zenml import client, conditions, resume\nfrom tests import flows_waiting as flows\n"
        text = imports + textwrap.dedent(code)
        done = subprocess.run(
            [sys.executable, "-c", text + "\nprint('ANSWER ' + json.dumps(answer, default=str))"],
            env=self.env, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWER "))
        return json.loads(line[7:])

    def rest(self, method: str, path: str, **more: Any) -> Any:
        """A call as the dashboard makes it."""
        token = requests.post(
            f"{self.server.url}/api/v1/login", data={"username": "default", "password": self.server.password}, timeout=20
        ).json()["access_token"]
        url = f"{self.server.url}/api/v1{path}"
        reply = requests.request(method, url, headers={"Authorization": f"Bearer {token}"}, timeout=20, **more)
        assert reply.ok, reply.text
        return reply.json()


@pytest.fixture
def remote(zenml_server: loopback.Server, tmp_path: Path) -> Remote:
    return Remote(zenml_server, tmp_path)


def test_an_answer_through_the_servers_api_continues_the_run(remote: Remote) -> None:
    run = remote.python("handle = flows.asking.run(1); answer = [handle.id, handle.status]")
    assert run[1] == "paused"
    [shown] = remote.rest("GET", f"/run_wait_conditions?status=pending&pipeline_run={run[0]}&hydrate=true")["items"]
    assert shown["name"] == "approve#0" and shown["metadata"]["question"] == "Spend 2?"
    remote.rest("PUT", f"/run_wait_conditions/{shown['id']}/resolve", json={"resolution": "continue", "result": {"ok": True}})
    # This server cannot launch workloads: it leaves the run to whoever continues it.
    assert remote.rest("GET", f"/runs/{run[0]}")["body"]["status"] == "paused"
    assert remote.python(f"answer = resume('{run[0]}').result()") == "spent 2"
    assert remote.effects.read_text().split("\n")[:-1] == ["prepare 1", "spend 2"]


def test_a_value_that_does_not_fit_is_refused_by_the_server_and_the_wait_stays_open(remote: Remote) -> None:
    run = remote.python("handle = flows.asking.run(1); answer = handle.id")
    [shown] = remote.rest("GET", f"/run_wait_conditions?status=pending&pipeline_run={run}")["items"]
    with pytest.raises(AssertionError, match="does not match"):
        remote.rest("PUT", f"/run_wait_conditions/{shown['id']}/resolve", json={"resolution": "continue", "result": {"ok": 7}})
    assert remote.python(f"answer = len(client.waits('{run}'))") == 1
    status = remote.python(f"answer = client.go_on(client.answer('{run}', {{'ok': False}}))")
    assert status == "completed"


def test_an_answer_reaches_an_executing_leg_and_the_server_does_not_touch_its_status(remote: Remote) -> None:
    code = """
        import threading, time
        handle = flows.asking.with_options(grace=60.0).submit(1)
        while (shown := conditions.pending(handle.id)) is None:
            time.sleep(0.1)
        time.sleep(1)
        from zenml.client import Client
        Client().resolve_run_wait_condition(shown.id, resolution="continue", result={"ok": True})
        seen = handle.status
        answer = [seen, handle.result(timeout=30), handle.status]
    """
    assert remote.python(code) == ["running", "spent 2", "completed"]


def test_an_abort_on_the_server_stops_the_run(remote: Remote) -> None:
    run = remote.python("handle = flows.undoable.run(1); answer = handle.id")
    [shown] = remote.rest("GET", f"/run_wait_conditions?status=pending&pipeline_run={run}")["items"]
    remote.rest("PUT", f"/run_wait_conditions/{shown['id']}/resolve", json={"resolution": "abort"})
    assert remote.rest("GET", f"/runs/{run}")["body"]["status"] == "stopped"
    assert remote.python(f"answer = client.waits('{run}')") == []
