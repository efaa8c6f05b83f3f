"""The soak: many runs over several workers while flows and workers are killed at random; `make soak`.

At the end all runs must have completed with the right result, and no step may have taken effect twice but for those that were in flight
when their process was killed. Prints what it did as JSON; exit code 1 if anything was lost, repeated or wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 1800.0  # seconds in which what is left after the killing must end


class Workers:
    """The workers, each restarted when it was killed."""

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self.killed, self.lock = folder, Counter[str](), threading.Lock()
        self.dead: set[int] = set()  # processes that were killed
        self.ended: list[int] = []  # exit codes of workers that ended by themselves
        self.workers = [self._start() for _ in range(count)]
        self.stopping = False

    def _start(self) -> subprocess.Popen[bytes]:
        log = (self.folder / "workers.log").open("ab")
        command = [
            sys.executable,
            "-m",
            "kitaru_zenml.cli.main",
            "worker",
            "--poll",
            "0.3",
            "--concurrency",
            "3",
            "--sweep",
            "20",
        ]
        return subprocess.Popen([*command, "--max-crashes", "50"], stdout=log, stderr=log, cwd=ROOT)

    def kill_one(self, choose: random.Random) -> None:
        """SIGKILL to a leg's process, or to a whole worker."""
        with self.lock:
            for at, worker in enumerate(self.workers):
                if (code := worker.poll()) is not None:
                    self.ended.append(code)  # by itself, which it must not
                    self.workers[at] = self._start()
            at = choose.randrange(len(self.workers))
            worker = self.workers[at]
            try:
                below = psutil.Process(worker.pid).children(recursive=True)
            except psutil.NoSuchProcess:
                below = []
            if below and choose.random() < 0.8:
                victim = choose.choice(below)
                self._kill(victim.pid)
                self.killed["legs"] += 1
                return
            for process in below:
                self._kill(process.pid)
            self._kill(worker.pid)
            worker.wait()
            self.killed["workers"] += 1
            self.workers[at] = self._start()

    def _kill(self, pid: int) -> None:
        self.dead.add(pid)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass

    def stop(self) -> list[int]:
        """SIGTERM to all; their exit codes."""
        for worker in self.workers:
            worker.terminate()
        return [worker.wait(60) for worker in self.workers]


def people(stop: threading.Event, listeners: list[str], choose: random.Random) -> None:
    """Answer every question and send the events, some of them twice."""
    from kitaru_zenml import client

    sent: Counter[str] = Counter()
    while not stop.wait(1):
        for question in client.waits():
            _patiently(client.answer, question.run_id, f"to {question.question}", wait=question.wait, by="soak")
        for run in listeners:
            if sent[run] < 3:
                key = f"order {sent[run]}"
                times = choose.randint(1, 2)
                sent[run] += all([_patiently(client.send_event, run, "orders", key, idempotency_key=key) for _ in range(times)])


def _patiently(call: Any, *args: Any, **kwargs: Any) -> bool:
    """Whether it worked; a run that has not begun has no journal yet, one that has just ended takes nothing."""
    from kitaru_zenml.errors import AlreadyAnswered, NoJournal, NoSuchWait, RunFinished

    try:
        call(*args, **kwargs)
    except (NoJournal, RunFinished, NoSuchWait, AlreadyAnswered):
        return False
    return True


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--runs", type=int, default=200)
    options.add_argument("--workers", type=int, default=3)
    options.add_argument("--minutes", type=float, default=10, help="of killing; what is left then is given time to end")
    options.add_argument("--kill-every", type=float, default=3, help="seconds")
    options.add_argument("--seed", type=int, default=int(time.time()))
    asked = options.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kitaru-soak-"))
    (folder / "zenml").mkdir()
    os.environ |= {
        "ZENML_CONFIG_PATH": str(folder / "zenml"), "SOAK_EFFECTS": str(folder / "effects"), "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_LOGGING_VERBOSITY": "ERROR", "AUTO_OPEN_DASHBOARD": "false", "KITARU_PROGRESS": "0",
    }  # fmt: skip
    (folder / "effects").touch()
    choose = random.Random(asked.seed)
    began = time.monotonic()
    runs = start_runs(asked.runs)
    print(f"{len(runs)} runs made in {time.monotonic() - began:.0f} s, seed {asked.seed}; all below {folder}", file=sys.stderr)
    workers, stop = Workers(asked.workers, folder), threading.Event()
    threading.Thread(
        target=people, args=(stop, [r for r, (f, _) in runs.items() if f == "listening"], choose), daemon=True
    ).start()
    left = soak(runs, workers, choose, asked.minutes * 60, asked.kill_every)
    stop.set()
    codes = workers.stop()
    found = judge(runs, workers, folder)
    report = {
        "runs": len(runs), "seconds": round(time.monotonic() - began), "killed": dict(workers.killed), "unfinished": len(left),
        "worker exit codes": [*workers.ended, *codes], "seed": asked.seed, **found,
    }  # fmt: skip
    print(json.dumps(report, indent=2))
    bad = left or found["wrong"] or found["repeated"] or any(codes) or workers.ended
    return 1 if bad else 0


def start_runs(count: int) -> dict[str, tuple[str, int]]:
    """Runs that nobody executes yet, and a hint for each: the workers begin them."""
    from zenml.client import Client
    from zenml.utils import source_utils

    from kitaru_zenml import leg
    from kitaru_zenml.artifact_store import open_store
    from kitaru_zenml.journal.due import leave_hint
    from tests.soak.flows import FLOWS

    source_utils.set_custom_source_root(str(ROOT))  # workers import the flows from there
    leg.warm_up()
    store, runs, names = open_store(Client().active_stack.artifact_store), dict[str, tuple[str, int]](), list(FLOWS)
    for n in range(count):
        name = names[n % len(names)]
        run, _ = FLOWS[name].create_run(f"soak-{n}", (n,), {})
        runs[str(run.id)] = name, n
        leave_hint(store, str(run.id), datetime.now(UTC))
    return runs


def soak(runs: dict[str, tuple[str, int]], workers: Workers, choose: random.Random, seconds: float, every: float) -> set[str]:
    """Kill until the time is over or all have ended, then let the rest end; the runs that did not."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    began, left, told = time.monotonic(), set(runs), 0.0
    while left and time.monotonic() - began < seconds + PATIENCE:
        time.sleep(every * (0.5 + choose.random()))
        if time.monotonic() - began < seconds:
            workers.kill_one(choose)
        if time.monotonic() - told > 15:
            told = time.monotonic()
            ended = {str(r.id) for r in depaginate(Client().list_pipeline_runs, status="completed")}
            left = set(runs) - ended
            print(f"{time.monotonic() - began:4.0f} s: {len(left)} to go, killed {dict(workers.killed)}", file=sys.stderr)
    return left


def judge(runs: dict[str, tuple[str, int]], workers: Workers, folder: Path) -> dict[str, Any]:
    """Results, and which steps took effect more often than kills explain."""
    from kitaru_zenml import RunHandle
    from tests.soak.flows import expected

    wrong = []
    for run, (name, n) in runs.items():
        try:
            result = RunHandle(run).result(timeout=1)
        except Exception as error:
            result = f"{type(error).__name__}: {error}"
        if result != expected(name, n):
            wrong.append(f"{name} {n} ({run}): {result!r}")
    by_step: dict[tuple[str, str], list[int]] = defaultdict(list)
    for line in (folder / "effects").read_text().splitlines():
        run, path, pid, _ = line.split("|", 3)
        by_step[run, path].append(int(pid))
    again = {step: pids for step, pids in by_step.items() if len(pids) > 1}
    # A step may run again only if the process that ran it before was killed with it in flight.
    repeated = [
        f"{run} {path} by {pids}" for (run, path), pids in again.items() if any(p not in workers.dead for p in pids[:-1])
    ]
    return {
        "steps": len(by_step), "repeated because they were in flight": len(again) - len(repeated), "repeated": repeated, "wrong": wrong,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
