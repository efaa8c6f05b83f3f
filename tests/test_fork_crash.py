"""SIGKILL while a fork is made and while it runs: what is left, and how it goes on. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from zenml.client import Client

from kitaru_zenml import delete, resume
from kitaru_zenml.errors import ForkIncomplete, RunHasForks
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.records import fork_name
from kitaru_zenml.runs import find_run, open_journal
from tests import flows_of_forks as flows
from tests.test_forks import assert_whole

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = """
import sys
from pathlib import Path
from zenml.utils import source_utils
source_utils.set_custom_source_root({root!r})
from kitaru_zenml import {module}
from tests import flows_of_forks as flows
from tests.crash.killing import KillingStore, die

class AtCreate(KillingStore):
    def _point(self, what):
        return what.startswith("create") and {what!r} in what and super()._point(what)

real = {module}.open_store
{module}.open_store = lambda of: AtCreate(real(of), 1, {when!r}, Path({log!r}))
flows.support.replay({origin!r}, overrides={{"judge#0": {{"kind": "reject"}}}})
"""


def killed(origin: str, folder: Path, what: str, when: str, module: str = "runs") -> str:
    """Replay in a process that is killed around the creation of an object; returns the fork's id."""
    script = folder / "replay.py"
    values = {"root": str(ROOT), "origin": origin, "what": what, "when": when, "module": module, "log": str(folder / "log")}
    script.write_text(textwrap.dedent(SCRIPT).format(**values))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'stacks'}"}
    done = subprocess.run([sys.executable, str(script)], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stdout[-2000:] + done.stderr[-2000:]
    (fork,) = [r for r in Client().list_pipeline_runs(pipeline="support", sort_by="desc:created", size=1, hydrate=True).items]
    assert fork.original_run is not None and str(fork.original_run.id) == origin
    return str(fork.id)


@pytest.fixture(scope="module")
def origin() -> str:
    return str(flows.support.run(3).id)


@pytest.mark.parametrize(
    ("what", "when"), [("/forks/", "before"), ("/forks/", "after"), ("create kitaru", "after"), ("/steps/", "after"),
     ("fork.json", "middle")]
)  # fmt: skip
def test_killed_before_the_fork_is_one_it_cannot_run_and_is_deleted(origin: str, tmp_path: Path, what: str, when: str) -> None:
    fork = killed(origin, tmp_path, what, when)
    journal = Journal(open_journal(find_run(origin)).store, fork)
    assert journal.fork() is None
    with pytest.raises(ForkIncomplete, match="kitaru delete"):
        resume(fork)
    if (what, when) != ("/forks/", "before"):
        with pytest.raises(RunHasForks, match=fork):
            delete(origin)
    delete(fork)
    assert journal.store.list(f"kitaru/{fork}/") == []
    assert_whole(origin)


@pytest.mark.parametrize(
    ("what", "when", "module"),
    [("fork.json", "after", "runs"), ("run.json", "after", "runs"), ("lease", "after", "leg"), ("/steps/act", "middle", "leg"),
     ("/steps/act", "after", "leg"), ("/events/", "before", "leg")],
)  # fmt: skip
def test_killed_afterwards_it_is_resumed(origin: str, tmp_path: Path, what: str, when: str, module: str) -> None:
    fork = killed(origin, tmp_path, what, when, module)
    assert open_journal(find_run(origin)).store.get(fork_name(fork))
    flows.RAN.clear()
    handle: Any = resume(fork)
    assert handle.result() == "did reject, signed by ann"
    expected = {"/steps/act after": ["sign"], "/events/ before": []}.get(f"{what} {when}", ["act reject", "sign"])
    assert expected == flows.RAN
    assert_whole(fork)
    statuses = {s.name: s.status.value for s in Client().list_run_steps(pipeline_run_id=fork, size=50).items}
    assert statuses == {
        "read#0": "cached", "read#1": "cached", "read#2": "cached", "judge#0": "completed", "act#0": "completed", "sign#0": "completed",
    }  # fmt: skip
    delete(fork)
