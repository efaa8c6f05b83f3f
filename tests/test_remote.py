"""Forks and the worker where runs are really kept: on an S3 endpoint, with a ZenML server over REST."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from kitaru_zenml_stacks import loopback

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.server


def python(env: dict[str, str], code: str) -> Any:
    """Run code in a process of its own; what it assigns to `answer`."""
    text = textwrap.dedent(code) + "\nimport json\nprint('ANSWER ' + json.dumps(answer, default=str))"
    done = subprocess.run([sys.executable, "-c", text], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads(next(line[7:] for line in done.stdout.splitlines() if line.startswith("ANSWER ")))


@pytest.fixture
def env(zenml_server: loopback.Server, moto: loopback.S3, tmp_path: Path) -> dict[str, str]:
    """Environment of processes whose active stack keeps its artifacts on the endpoint."""
    effects = tmp_path / "effects"
    effects.touch()
    env = {**os.environ, **zenml_server.client_env(tmp_path / "client"), "EFFECTS": str(effects)}
    name = f"remote-{uuid4().hex[:8]}"
    config = json.dumps(moto.artifact_store_config(name))
    command = [sys.executable, "-m", "tests.crash.register", config, name]
    registered = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert registered.returncode == 0, registered.stderr[-2000:]
    stack = json.loads(next(line[6:] for line in registered.stdout.splitlines() if line.startswith("STACK ")))["id"]
    return env | {"ZENML_ACTIVE_STACK_ID": stack}


@pytest.mark.timeout(400)
def test_a_fork_on_s3_and_rest_reuses_what_it_may_and_takes_an_override(env: dict[str, str]) -> None:
    answer = python(
        env,
        """
        from zenml.client import Client
        from zenml.enums import ArtifactSaveType
        from kitaru_zenml import client, resume
        from tests import flows_waiting as flows

        origin = flows.asking.run(4)
        client.answer(origin.id, {"ok": True})
        assert resume(origin.id).result() == "spent 5"
        fork = flows.asking.replay(origin.id, overrides={"approve": {"ok": False}}, label="too much")
        steps = {s.name: s for s in Client().list_run_steps(pipeline_run_id=fork.id, hydrate=True, size=50).items}
        old = {s.name: s for s in Client().list_run_steps(pipeline_run_id=origin.id, hydrate=True, size=50).items}
        answer = {
            "result": fork.result(),
            "origin": str(fork.run.original_run.id) == origin.id,
            "prepare": steps["prepare#0"].status.value,
            "same artifact": steps["prepare#0"].output.id == old["prepare#0"].output.id,
            "approve": steps["approve#0"].output.save_type == ArtifactSaveType.MANUAL,
        }
        """,
    )
    assert answer == {
        "result": "kept", "origin": True, "prepare": "cached", "same artifact": True, "approve": True,
    }  # fmt: skip
    assert Path(env["EFFECTS"]).read_text().splitlines() == ["prepare 4", "spend 5", "spend 5"]


@pytest.mark.timeout(400)
def test_a_worker_on_s3_and_rest_continues_what_the_server_was_answered_and_what_was_killed(env: dict[str, str]) -> None:
    asked = python(env, "from tests import flows_waiting as flows; answer = flows.asking.run(1).id")
    killed = subprocess.Popen(
        [sys.executable, "-c", "from tests import flows_waiting as flows; flows.asking.with_options(grace=60.0, lapse_seconds=3.0).run(7)"],
        env=env, cwd=ROOT,
    )  # fmt: skip
    effects = Path(env["EFFECTS"])
    await_line(effects, "prepare 7")
    time.sleep(1)
    killed.kill()
    killed.wait()
    worker = subprocess.Popen(
        [sys.executable, "-m", "kitaru_zenml.cli.main", "worker", "--poll", "0.3", "--answers", "0.5"], env=env, cwd=ROOT
    )
    try:
        python(
            env,
            f"""
            from zenml.client import Client
            from kitaru_zenml import conditions
            shown = conditions.pending({asked!r})
            answer = Client().resolve_run_wait_condition(shown.id, resolution="continue", result={{"ok": True}}).status
            """,
        )
        await_line(effects, "spend 2")
        python(
            env,
            """
            import time
            from kitaru_zenml import client
            while not (questions := client.waits()):
                time.sleep(0.3)
            answer = [client.answer(q.run_id, {"ok": True}).by for q in questions]
            """,
        )
        await_line(effects, "spend 8")
    finally:
        worker.terminate()
        worker.wait(60)
    assert sorted(effects.read_text().splitlines()) == ["prepare 1", "prepare 7", "spend 2", "spend 8"]


def await_line(path: Path, line: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while line not in path.read_text().splitlines():
        assert time.monotonic() < deadline, f"`{line}` never happened: {path.read_text()}"
        time.sleep(0.1)
