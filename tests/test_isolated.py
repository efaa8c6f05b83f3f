"""Steps in a place of their own, on an orchestrator that can isolate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.timeout(240)
def test_an_isolated_step_is_a_native_step_run_in_another_process(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "ZENML_CONFIG_PATH": str(tmp_path / "zenml"),
        "ISOLATED_LOG": str(tmp_path / "isolated.log"),
        "PYTHONPATH": str(ROOT),
        "ZENML_DYNAMIC_PIPELINE_MONITORING_INTERVAL": "0.5",
    }
    (tmp_path / "zenml").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "tests.isolated_run"], env=env, cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    log = tmp_path / "isolated.log"
    assert lines, done.stderr[-3000:] + (log.read_text()[-2000:] if log.exists() else "")
    found = json.loads(lines[0][7:])
    assert (found["status"], found["result"], found["steps"]) == ("completed", 5, ["double#0", "heavy#0"])
    assert not found["differences"]
    assert log.exists(), "no process was started for it"
