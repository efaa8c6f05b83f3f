"""Workers and dying runs as real processes, and what they left behind."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zenml.client import Client

from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.runs import find_run, open_journal
from kitaru_zenml.worker.child import PRELOADED
from tests.worker import flows

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 30.0


def until(what: Callable[[], Any], seconds: float = PATIENCE, told: Callable[[], str] = str) -> Any:
    """Wait until something is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, f"it never came:\n{told()}"
        time.sleep(0.05)
    return value


class Worker:
    """`kitaru worker` as a process."""

    def __init__(self, folder: Path, *arguments: str, poll: float = 0.1, cwd: Path = ROOT, **env: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.log_file = folder / f"worker-{time.monotonic_ns()}.log"
        self._log = open(self.log_file, "wb")
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kitaru_zenml.cli.main", "worker", "--poll", str(poll), "--answers", "0.3", *arguments],
            cwd=cwd, env={**os.environ, "PYTHONPATH": path, **env}, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def until(self, what: Callable[[], Any], seconds: float = PATIENCE) -> Any:
        return until(what, seconds, lambda: self.log[-6000:])

    def said(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.log)

    def up(self) -> Worker:
        self.until(lambda: self.said("every unfinished run was looked at") and self.said("worker is up"), 60)
        return self

    def until_status(self, run: str, *statuses: str, seconds: float = PATIENCE) -> str:
        return str(self.until(lambda: (s := status(run)) in statuses and s, seconds))

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.terminate()
        code = self.process.wait(60)
        self._log.close()
        return code

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._log.close()


def status(run: str) -> str:
    return find_run(run).status.value


def journal(run: str) -> Journal:
    return open_journal(find_run(run))


def effects(name: str) -> list[str]:
    """What the steps of a run did, in order."""
    lines = [line.split("|") for line in flows.effects().read_text().splitlines()]
    return [line[1] for line in lines if line[0] == name]


def effect_lines(name: str) -> list[list[str]]:
    """(what, pid, time) of each effect."""
    lines = [line.split("|") for line in flows.effects().read_text().splitlines()]
    return [line[1:] for line in lines if line[0] == name]


def epochs(run: str) -> int:
    return len(journal(run).leases())


# --- a run in a process of its own, which may die ---

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([*PRELOADED, "tests.worker.flows"])


def _execute(flow: str, arguments: tuple[Any, ...], sleep: float) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    getattr(flows, flow).run(*arguments)


def start(flow: str, *arguments: Any) -> Any:
    """Run a flow in a process of its own."""
    process = _context.Process(target=_execute, args=(flow, arguments, 0.0))
    process.start()
    return process


def run_to_death(flow: str, *arguments: Any) -> str:
    """A run of the flow whose process has died; its id."""
    process = start(flow, *arguments)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, process.exitcode
    return newest(flow)


def newest(flow: str) -> str:
    """Id of the newest run of a flow."""
    return str(Client().list_pipeline_runs(pipeline=flow, sort_by="desc:created", size=1).items[0].id)
