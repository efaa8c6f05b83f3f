"""The processes that execute runs: forked from one that has imported everything, one of them warm and waiting for the next run.

A process serves one run and ends. How it ended is what it said over its pipe; one that said nothing has crashed. It goes on when the
worker dies: its lease tells everybody that the run is executed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from kitaru_zenml.limits import LIMITS, Limits
from kitaru_zenml.worker.child import PRELOADED, Order, Outcome, main

SPARE_RETRY = 5.0  # seconds before another spare is started when one died unused
FORK_TRIES = 5
STOP_PATIENCE = 6.0  # seconds after which a process that was asked to end is killed


@dataclass
class Child:
    """A process, idle or with an order."""

    process: BaseProcess
    pipe: Connection
    order: Order | None = None
    limit: str | None = None  # of the run that it executes
    outcome: Outcome | None = None
    is_ready: bool = False
    started: float = field(default_factory=time.monotonic)

    @property
    def run_id(self) -> str:
        """Of the run that it executes."""
        return self.order.run_id if self.order is not None else ""


class Children:
    """The worker's child processes.

    Args:
        log_format: Of their log.
        limits: Sizes of the named limits.
    """

    def __init__(self, log_format: str, limits: dict[str, int]) -> None:
        self._slots = Path(tempfile.mkdtemp(prefix="kitaru-worker-"))
        os.environ[LIMITS] = Limits(self._slots, limits).to_environment()
        os.environ["KITARU_PROGRESS"] = "plain"
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._log_format = log_format
        self._spare: Child | None = None
        self._next_spare = 0.0
        self.busy: dict[str, Child] = {}  # by run id
        self._leaving: list[Child] = []  # that have said how their run ended; child runs that they began may still run there

    def keep_spare(self) -> None:
        """See that a process is warm, or getting so."""
        if self._spare is None and time.monotonic() >= self._next_spare:
            self._spare = self._start()

    def _start(self) -> Child:
        tries = 0
        while True:
            ours, theirs = self._context.Pipe()
            process = self._context.Process(target=main, args=(theirs, self._log_format), name="kitaru-run", daemon=False)
            try:
                process.start()
            except (EOFError, OSError):  # the process that forks was killed just now; the next try starts another
                ours.close()
                tries += 1
                if tries == FORK_TRIES:
                    raise
                time.sleep(0.1)
            else:
                return Child(process, ours)
            finally:
                theirs.close()

    def give(self, order: Order, limit: str | None) -> Child:
        """Have a process execute an order; there must be none for its run."""
        child, self._spare = self._spare or self._start(), None
        try:
            child.pipe.send(order)
        except OSError:  # the spare died just now
            self._dispose(child)
            child = self._start()
            child.pipe.send(order)
        child.order, child.limit, child.started = order, limit, time.monotonic()
        self.busy[order.run_id] = child
        return child

    @property
    def at_work(self) -> int:
        """How many processes have not ended, but for the spare."""
        return len(self.busy) + len(self._leaving)

    def count(self, limit: str) -> int:
        """How many runs of a limit are being executed."""
        return sum(child.limit == limit for child in self.busy.values())

    def wait(self, timeout: float, *others: Any) -> None:
        """Until a child says something, one of the others is readable, or the seconds have passed."""
        talking = [*self.busy.values(), *([self._spare] if self._spare else [])]
        processes = [child.process.sentinel for child in (*talking, *self._leaving)]
        wait([*(child.pipe for child in talking), *processes, *others], timeout)

    def ended(self) -> Iterator[tuple[Order, Outcome, float]]:
        """The orders that have ended, each once: how, and after how many seconds."""
        if self._spare is not None:
            self._listen(self._spare)
            if self._spare.process.exitcode is not None:
                self._dispose(self._spare)
                self._spare, self._next_spare = None, time.monotonic() + SPARE_RETRY
        for child in [child for child in self._leaving if child.process.exitcode is not None]:
            self._leaving.remove(child)
            self._dispose(child)
        for child in list(self.busy.values()):
            exitcode = child.process.exitcode  # before its last words are read
            self._listen(child)
            if child.outcome is None and exitcode is None:
                continue
            assert child.order is not None
            del self.busy[child.run_id]
            self._leaving.append(child)
            outcome = child.outcome or Outcome("crashed", _how_it_died(exitcode or 0))
            yield child.order, outcome, time.monotonic() - child.started

    def _listen(self, child: Child) -> None:
        with contextlib.suppress(EOFError, OSError):
            while child.outcome is None and child.pipe.poll():
                said = child.pipe.recv()
                if isinstance(said, Outcome):
                    child.outcome = said
                else:
                    child.is_ready = True

    @property
    def is_warm(self) -> bool:
        """Whether a process is ready for the next run."""
        return self._spare is not None and self._spare.is_ready

    # --- ending ---

    def close(self) -> None:
        """Nothing runs any more."""
        self.close_spare()
        shutil.rmtree(self._slots, ignore_errors=True)

    def close_spare(self) -> None:
        """No new run will be started."""
        if self._spare is not None:
            spare, self._spare = self._spare, None
            self._kill(spare)  # it holds nothing
            self._dispose(spare)
        self._next_spare = float("inf")

    def ask_to_stop(self) -> None:
        """Let every leg stop at its next boundary."""
        for child in (*self.busy.values(), *self._leaving):
            with contextlib.suppress(OSError):
                child.pipe.send("stop")
            self._signal(child, signal.SIGTERM)

    def kill(self) -> None:
        """End what is left."""
        for child in (*self.busy.values(), *self._leaving):
            self._kill(child)

    def _kill(self, child: Child) -> None:
        self._signal(child, signal.SIGKILL)
        child.process.join(STOP_PATIENCE)

    def _signal(self, child: Child, number: signal.Signals) -> None:
        pid = child.process.pid
        if pid is not None and child.process.exitcode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _dispose(self, child: Child) -> None:
        child.pipe.close()
        child.process.join(1.0)
        if child.process.exitcode is not None:
            child.process.close()


def _how_it_died(exitcode: int) -> str:
    if exitcode < 0:
        try:
            return f"killed by {signal.Signals(-exitcode).name}"
        except ValueError:
            return f"killed by signal {-exitcode}"
    return f"it ended with exit code {exitcode} in the middle of the run"
