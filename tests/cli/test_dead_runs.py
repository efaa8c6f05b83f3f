"""The command line on runs whose process is gone, with real processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner, Result
from zenml.client import Client

from kitaru_zenml.cli.main import main
from kitaru_zenml.journal.journal import new_nonce
from kitaru_zenml.journal.records import Holder, Lease, lease_name, seal
from kitaru_zenml.runs import find_run, open_journal
from tests.cli import flows_for_cli

ROOT = Path(__file__).resolve().parents[2]
KITARU = str(Path(sys.executable).with_name("kitaru"))


def kitaru(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def as_json(*arguments: str) -> Any:
    return json.loads(kitaru(*arguments, "--output", "json").stdout)


def killed(flow: str, n: int, at: str) -> str:
    """A run of the flow whose process was killed at that point."""
    code = subprocess.run(
        [sys.executable, "-m", "tests.cli.flows_for_cli", flow, str(n)],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "DIE": at}, timeout=120,
    )  # fmt: skip
    assert code.returncode == -9, code.stderr
    return str(as_json("runs", "--flow", flow, "--limit", "1")[0]["id"])


def test_a_killed_run_is_found_shown_explained_resumed_and_verified() -> None:
    run = killed("audit", 4, "judge 2")
    assert run in [r["id"] for r in as_json("runs", "--status", "dead")]
    assert run not in [r["id"] for r in as_json("runs", "--status", "running")]

    shown = kitaru("show", run).stdout
    assert "audit dead" in shown and f"Next: kitaru resume {run}" in shown and "○ judge#2" in shown
    assert as_json("show", run, "--watch")["status"] == "dead", "watching a dead run comes to an end"

    report = as_json("failure", run)
    assert report["ending"] == "found dead" and "judge#2" in [s["display"] for s in report["in_flight"]]
    assert "found dead" in kitaru("failure", run).stdout

    before = as_json("verify", run)
    assert before["ok"] and any("leg 1" in n and "was killed or superseded and closed nothing" in n for n in before["notes"])

    done = subprocess.run(
        [KITARU, "resume", run, "--output", "json"],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "KITARU_PROGRESS": "plain"}, timeout=120,
    )  # fmt: skip
    result = json.loads(done.stdout)  # nothing else on stdout, though the flow prints
    assert "the flow prints this" in done.stderr
    assert f"Look at it with `kitaru show {run}`" in done.stderr
    assert (result["status"], result["replayed"], result["ran"]) == ("completed", 3, 3)

    after = as_json("show", run)
    assert after["status"] == "completed" and after["totals"]["kept_from_earlier_legs"] == 5 and len(after["legs"]) == 2
    assert "kept from leg 1" in kitaru("show", run).stdout
    assert as_json("verify", run)["ok"]
    assert "later leg went on" in kitaru("failure", run).stdout


def test_a_step_in_doubt_is_shown_refused_and_settled() -> None:
    run = killed("paying", 5, "pay")
    shown = kitaru("show", run).stdout
    assert "? pay#0" in shown and f"kitaru settle {run} 'pay#0' --value JSON|--retry" in shown
    assert as_json("step", run, "pay#0")["status"] == "in doubt"
    assert "kitaru settle" in kitaru("step", run, "pay#0").stdout
    refused = as_json("resume", run)
    assert refused["error"] == "StepInDoubt" and refused["step"] == "pay#0"
    assert kitaru("settle", run, "pay#0", "--value", '"paid by hand"').exit_code == 0
    assert as_json("resume", run)["status"] == "completed"
    step = as_json("step", run, "pay#0")
    assert step["output"] == "paid by hand" and step["metadata"] == {"settled": True}


def test_resume_waits_for_the_lease_of_an_unknown_machine_and_says_so() -> None:
    run = killed("short_lease", 2, "end")
    journal = open_journal(find_run(run))
    elsewhere = Holder(host="elsewhere", boot="another", pid=1, started=0.0)
    lease = Lease(
        nonce=new_nonce(), run_id=run, epoch=2, holder=elsewhere, purpose="run", lapse_seconds=2, taken_at=datetime.now(UTC)
    )
    assert journal.store.create(lease_name(run, 2), seal(lease)) is None
    began = time.monotonic()
    done = kitaru("resume", run, "--output", "json")
    assert json.loads(done.stdout)["status"] == "completed"
    assert "process 1 on elsewhere may still hold the run" in done.stderr and time.monotonic() - began > 2


@pytest.fixture
def changing_flow(tmp_path: Path) -> Callable[[str], Path]:
    """A flow's module, written anew."""

    def write(body: str) -> Path:
        module = tmp_path / "changing_flow.py"
        module.write_text(
            "import os\nfrom kitaru_zenml import checkpoint, flow\n"
            "@checkpoint\ndef old(n: int) -> int:\n    return n\n"
            "@checkpoint\ndef fresh(n: int) -> int:\n    return -n\n"
            f"@flow\ndef changing() -> int:\n{body}\n"
            "if __name__ == '__main__':\n    changing.run()\n"
        )
        return module

    return write


def test_resume_with_changed_code_lists_what_vanished_and_what_is_new(changing_flow: Callable[[str], Path]) -> None:
    module = changing_flow("    old(1)\n    old(2)\n    os.kill(os.getpid(), 9)\n    return 0")
    subprocess.run([sys.executable, str(module)], cwd=module.parent, capture_output=True, timeout=120)
    run = str(as_json("runs", "--flow", "changing", "--limit", "1")[0]["id"])
    changing_flow("    return old(1) + fresh(5)")
    result = as_json("resume", run)
    assert result["status"] == "completed" and result["code_changed"]
    assert result["vanished"] == ["old#1"] and result["new"] == ["fresh#0"]


def test_names_and_messages_with_brackets_are_printed_whole() -> None:
    with pytest.raises(ValueError, match="refused"):
        flows_for_cli.refunding.run(30)
    run = str(as_json("runs", "--flow", "refunding", "--limit", "1")[0]["id"])
    for command in (["show", run], ["failure", run], ["step", run, "refund[call_7]"]):
        text = kitaru(*command).stdout
        assert "refund[call_7]" in text and "refund [30] is refused" in text, text
    assert f"kitaru step {run} 'refund[call_7]'" in kitaru("failure", run).stdout
    failure = kitaru("failure", run).stdout
    assert "flows_for_cli.py" in failure and "engine.py" not in failure, "the frames are those of the user's code"


def test_zenml_out_of_reach_is_said_without_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        try:
            raise requests.ConnectionError("connection refused")
        except requests.ConnectionError as cause:
            raise RuntimeError("Error connecting to URL 'http://127.0.0.1:9'") from cause  # as ZenML's REST client wraps it

    monkeypatch.setattr(Client, "list_pipeline_runs", refused)
    monkeypatch.setattr(Client, "active_user", property(refused))
    plain = CliRunner().invoke(main, ["runs"])
    assert plain.exit_code == 1 and "ZenML cannot be reached" in plain.stderr and "zenml status" in plain.stderr
    assert "Traceback" not in plain.output
    assert json.loads(CliRunner().invoke(main, ["runs", "-o", "json"]).stdout)["error"] == "RuntimeError"
    assert isinstance(CliRunner().invoke(main, ["runs", "--debug"]).exception, RuntimeError)
    doctor = CliRunner().invoke(main, ["doctor"])
    assert doctor.exit_code == 1 and "✗ ZenML connection" in doctor.stdout and "zenml login" in doctor.stdout
