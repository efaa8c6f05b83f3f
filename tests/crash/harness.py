"""Runs a flow in a child process, kills it with SIGKILL at a chosen store operation, resumes it, and checks what was promised."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.store import Store

ROOT = Path(__file__).resolve().parents[2]
MAX_LEGS = 12


class Zygote:
    """The process that forks legs; see `zygote`."""

    def __init__(self, env: dict[str, str]) -> None:
        self.database = Path(env["ZENML_CONFIG_PATH"]) / "local_stores" / "default_zen_store" / "zenml.db"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.crash.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=ROOT,
            text=True,
        )
        self.lock = threading.Lock()
        assert json.loads(self._line())["ready"]

    def _line(self) -> str:
        assert self.process.stdout is not None
        while not (line := self.process.stdout.readline()).startswith("{"):  # ZenML talks while it is imported
            assert line, "the zygote died"
        return line

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Give an order and read its answer."""
        with self.lock:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._line())
            return answer

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)


@dataclass
class Leg:
    """A leg as a process."""

    pid: int
    answer_file: Path
    log: Path
    ops: Path
    zygote: Zygote
    exit: int | None = None

    def stop(self, database: Path) -> None:
        """SIGSTOP, at a moment when it does not hold SQLite's lock: a stopped process that does stops everybody, whatever we do."""
        while True:
            os.kill(self.pid, signal.SIGSTOP)
            with contextlib.closing(sqlite3.connect(database, timeout=0.3, isolation_level=None)) as connection:
                try:
                    connection.execute("BEGIN IMMEDIATE")
                    connection.execute("ROLLBACK")
                    return
                except sqlite3.OperationalError:
                    os.kill(self.pid, signal.SIGCONT)
                    time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and wait."""
        if self.exit is None:
            os.kill(self.pid, signal.SIGKILL)
            self.wait()

    def wait(self) -> int:
        """Until it ends; its exit code, negative for a signal."""
        if self.exit is None:
            self.exit = int(self.zygote.ask({"do": "wait", "pid": self.pid})["exit"])
        return self.exit

    @property
    def answer(self) -> dict[str, Any]:
        """What it left, if it ended by itself."""
        self.wait()
        assert self.answer_file.exists(), f"the leg left no answer, exit {self.exit}:\n{self.log.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(self.answer_file.read_text())
        return answer

    @property
    def operations(self) -> list[str]:
        """The store operations that were counted."""
        return self.ops.read_text().splitlines() if self.ops.exists() else []


@dataclass
class Case:
    """One run under test: its effects, its legs, its journal."""

    zygote: Zygote
    folder: Path
    store: Store  # the artifact store's root, to look at the journal
    env: dict[str, str] = field(default_factory=dict)
    numbers: Any = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.effects = self.folder / "effects"
        self.effects.touch()
        self.known = set(self._run_ids())
        self.legs: list[Leg] = []

    def _run_ids(self) -> list[str]:
        names = self.store.list("kitaru/")
        return list(
            {name.split("/")[1] for name in names if name.split("/")[1] != "artifacts" and not name.startswith("kitaru/_")}
        )

    def start(self, do: str, **order: Any) -> Leg:
        """Start a leg."""
        number = next(self.numbers)
        answer, log, ops = (self.folder / f"{number}.{kind}" for kind in ("answer", "log", "ops"))
        env = {**self.env, "CRASH_EFFECTS": str(self.effects)}
        told = {"do": do, "env": env, "answer": str(answer), "log": str(log), "ops": str(ops), **order}
        self.legs.append(Leg(self.zygote.ask(told)["pid"], answer, log, ops, self.zygote))
        return self.legs[-1]

    def end(self) -> None:
        """Kill what still runs."""
        for leg in self.legs:
            leg.kill()

    @property
    def run(self) -> str | None:
        """The run's id: that of the journal that is new in the store, and no child's."""
        found = []
        for run in self.new_runs():
            info = Journal(self.store, run).info()
            if info is None or info.parent is None:
                found.append(run)
        assert len(found) < 2, found
        return found[0] if found else None

    def new_runs(self) -> set[str]:
        """Every run whose journal is new in the store."""
        return set(self._run_ids()) - self.known

    def recorded(self) -> set[str]:
        """Paths that have a record now."""
        if self.run is None:
            return set()
        return {record.path for record in Journal(self.store, self.run).load().records.values() if record.failure is None}

    def effect_lines(self) -> list[list[str]]:
        """(path, idempotency key, pid, what) of each effect."""
        return [line.split("|") for line in self.effects.read_text().splitlines()]


@dataclass
class Tally:
    """What a sweep found."""

    points: int = 0
    killed: int = 0
    lost: int = 0
    repeated: int = 0
    resumes: int = 0


def crash_and_resume(case: Case, flow: str, at: int, when: str, tally: Tally, recorder: bool = False) -> dict[str, Any] | None:
    """One crash point: run, die there, resume until the run completes, and check what was promised. `None` if there is no such point."""
    leg = case.start("run", flow=flow, at=at, when=when, recorder=recorder)
    tally.points += 1
    if leg.wait() == 0:
        answer = leg.answer
        assert "error" not in answer, answer
        return check(case, answer, leg)
    assert leg.exit == -9, leg.log.read_text()[-3000:]
    tally.killed += 1
    if case.run is None:
        return None  # nothing began: ZenML has a run without a journal, which `test_sweep` resumes apart
    for _ in range(MAX_LEGS):
        stored, effects = case.recorded(), len(case.effect_lines())
        resumed = case.start("resume", run=case.run)
        answer = resumed.answer
        tally.resumes += 1
        ran_again = [line for line in case.effect_lines()[effects:] if line[0] in stored]
        tally.repeated += len(ran_again)
        assert not ran_again, f"finished steps ran again: {ran_again}"
        lost = stored - case.recorded()
        tally.lost += len(lost)
        assert not lost, f"records were lost: {lost}"
        if answer.get("error") == "StepInDoubt":
            settle(case, answer)
            continue
        if answer.get("error") == "RunFinished":  # killed after everything: look at it as it is
            answer = case.start("look", run=case.run).answer
        assert "error" not in answer, f"{answer}\n{resumed.log.read_text()[-3000:]}"
        return check(case, answer, resumed)
    raise AssertionError("the run does not complete")


def settle(case: Case, answer: dict[str, Any]) -> None:
    """A person looks whether the payment took effect, and says so."""
    assert case.run is not None
    step = answer["message"].split("`")[1]
    paid = [line for line in case.effect_lines() if "/pay@" in line[0]]
    assert len(paid) <= 1, "an at-most-once body ran twice"
    order: dict[str, Any] = {"value": ["100 euro", 0]} if paid else {"retry": True}
    settled = case.start("settle", run=case.run, step=step, **order).answer
    # On an object store the record's request may have been under way at the kill, and arrive after the resume that missed it.
    assert settled.get("settled") or "nothing to settle" in settled["message"], settled


def check(case: Case, answer: dict[str, Any], leg: Leg) -> dict[str, Any]:
    """Journal, ZenML and the outside world tell one story."""
    said = f"{answer}\n{leg.log.read_text()[-2000:]}"
    assert answer["status"] == "completed", said
    assert not answer["problems"], said
    assert not answer["differences"], said
    twice = [name for name, n in collections.Counter(answer["steps"]).items() if n > 1]
    assert not twice, f"steps twice in ZenML: {twice}"
    made = [line for line in case.effect_lines() if "/pay@" in line[0]]
    assert len(made) <= 1, "an at-most-once body ran twice"
    return answer


def without_random_parts(value: Any) -> Any:
    """A result with its random numbers taken out."""
    if isinstance(value, list):
        return [without_random_parts(item) for item in value if not isinstance(item, int)]
    return value


def fresh_folder(parent: Path) -> Path:
    """A folder for a case."""
    return parent / uuid.uuid4().hex[:12]


def environment(config: Path, **more: str) -> dict[str, str]:
    """The environment of legs that use a ZenML of their own."""
    config.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "ZENML_CONFIG_PATH": str(config),
        "ZENML_ANALYTICS_OPT_IN": "false",
        "ZENML_LOGGING_VERBOSITY": "ERROR",
        "AUTO_OPEN_DASHBOARD": "false",
        "KITARU_PROGRESS": "0",
        **more,
    }
