"""What a child process of the worker does: it warms up, takes one order over its pipe, executes it, says how it ended, and ends.

An order names a run; the child continues it as `resume` does, under the run's own lease. Asked to end (SIGTERM, or by the pipe), it stops
the leg at its next boundary, or lets the run go under a body that takes too long. A process that ends without having said how has crashed.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Literal

from kitaru_zenml.errors import (
    KitaruError,
    LeaseLost,
    LegInterrupted,
    RunCancelled,
    RunFinished,
    RunIsLeased,
    StoreUnavailable,
)

logger = logging.getLogger("kitaru_zenml.worker")

# What the process that forks children has imported.
PRELOADED = [
    "zenml.client",
    "zenml.zen_stores.sql_zen_store",
    "zenml.zen_stores.rest_zen_store",
    "zenml.pipelines",
    "zenml.execution.pipeline.dynamic.runner",
    "kitaru_zenml.flows",
    "kitaru_zenml.resumption",
    "kitaru_zenml.worker.giving_up",
    "kitaru_zenml.worker.child",
]
ORDERLY_STOP = 3.0  # seconds in which a leg that is asked to stop may come to a boundary; then the run is let go under it
RUN_ID = "KITARU_RUN_ID"  # environment of a child: for the log

Do = Literal["continue", "give up"]
How = Literal[
    "completed", "paused", "failed", "stopped", "submitted",  # of the run
    "leased", "finished", "superseded", "interrupted", "unavailable", "crashed",  # of the child
]  # fmt: skip


@dataclass(frozen=True)
class Order:
    """What a child is to do."""

    run_id: str
    do: Do = "continue"
    why: str = ""
    watched: tuple[int, int] | None = None


@dataclass(frozen=True)
class Outcome:
    """How a child ended."""

    how: How
    detail: str = ""


def main(pipe: Connection, log_format: str) -> None:
    """The process. Ends by returning, or at once when it was asked to stop and could not in time."""
    from kitaru_zenml.worker.log import log_to_stderr

    os.setpgrp()  # the terminal's Ctrl-C is for the worker, which asks its children to end
    log_to_stderr(log_format)
    stopping = _Stopping(pipe)
    stopping.listen()
    try:
        _warm_up()
        pipe.send("ready")
    except Exception as problem:  # it may be better when there is something to do
        logger.warning("a process could not be warmed up: %s", problem)
    order = stopping.await_order()
    if order is None:
        return
    os.environ[RUN_ID] = order.run_id
    outcome = _perform(order)
    stopping.finished(outcome)
    sys.stdout.flush()
    sys.stderr.flush()


def _warm_up() -> None:
    from zenml.client import Client

    from kitaru_zenml import leg
    from kitaru_zenml.artifact_store import open_store

    leg.warm_up()
    Client().list_pipeline_runs(size=1, hydrate=True)
    open_store(Client().active_stack.artifact_store)


def _perform(order: Order) -> Outcome:
    from kitaru_zenml.worker.giving_up import give_up

    try:
        if order.do == "give up":
            give_up(order.run_id, order.why, order.watched)
            return Outcome("failed", order.why)
        return _continue(order)
    except RunIsLeased as leased:
        return Outcome("leased", leased.holder)
    except RunFinished as finished:
        return Outcome("finished", finished.status)
    except RunCancelled as cancelled:
        return Outcome("stopped", str(cancelled))
    except LegInterrupted:
        return Outcome("interrupted")
    except LeaseLost as lost:
        return Outcome("superseded", lost.holder)
    except Exception as error:
        return _failed(order, error)


def _continue(order: Order) -> Outcome:
    from kitaru_zenml.resumption import resume

    handle = resume(order.run_id, wait=False, watched=order.watched)
    status = handle.status
    if status in ("completed", "paused", "failed", "stopped"):
        how: How = status  # type: ignore[assignment]
        return Outcome(how)
    return Outcome("submitted", status)


def _failed(order: Order, error: Exception) -> Outcome:
    """The flow raised, which ZenML shows by now; or the run could not be continued at all, which somebody must see."""
    from kitaru_zenml.leg import is_unreachable
    from kitaru_zenml.worker.giving_up import fail_unless_closed

    said = str(error) if isinstance(error, KitaruError) else f"{type(error).__name__}: {error}"
    if isinstance(error, StoreUnavailable) or is_unreachable(error):
        return Outcome("unavailable", said)
    try:
        fail_unless_closed(order.run_id, error)
    except RunIsLeased as leased:
        return Outcome("leased", leased.holder)
    except RunFinished as finished:
        return Outcome("finished", finished.status)
    except Exception as problem:
        logger.warning("run %s: that it cannot be continued could not be stored: %s", order.run_id, problem)
        return Outcome("unavailable", said)
    return Outcome("failed", said)


class _Stopping:
    """The thread that reads the pipe, for orders and for the word to stop; SIGTERM says the same.

    A signal's handler runs in the main thread when that comes back to Python; the wake-up descriptor is written at once.
    """

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._order: Order | None = None
        self._ordered, self._asked, self._done = threading.Event(), threading.Event(), threading.Event()
        self._wake_up, self._woken = os.pipe()

    def listen(self) -> None:
        """Begin to listen."""
        os.set_blocking(self._woken, False)
        signal.signal(signal.SIGTERM, lambda *_: self._asked.set())
        signal.set_wakeup_fd(self._woken, warn_on_full_buffer=False)
        for work in (self._read_pipe, self._read_signals, self._stop):
            threading.Thread(target=work, name=f"kitaru-child{work.__name__}", daemon=True).start()

    def await_order(self) -> Order | None:
        """The order, or `None` if there is none to come."""
        self._ordered.wait()
        return self._order

    def finished(self, outcome: Outcome) -> None:
        """Say how it ended, once."""
        self._done.set()
        try:
            self._pipe.send(outcome)
        except OSError:
            pass  # the worker is gone: the journal knows

    def _read_pipe(self) -> None:
        try:
            while (message := self._pipe.recv()) != "stop":
                self._order = message
                self._ordered.set()
        except (EOFError, OSError):  # the worker is gone: a leg goes on by itself, an idle process ends
            self._ordered.set()
            return
        self._asked.set()

    def _read_signals(self) -> None:
        while signal.SIGTERM not in os.read(self._wake_up, 64):
            pass
        self._asked.set()

    def _stop(self) -> None:
        from kitaru_zenml.execution import live

        self._asked.wait()
        if not self._ordered.is_set():
            os._exit(0)
        deadline = time.monotonic() + ORDERLY_STOP
        while time.monotonic() < deadline and not (self._done.is_set() and not live()):
            for execution in live():  # one that has not begun yet is stopped when it begins; child runs too
                execution.interrupt()
            time.sleep(0.02)
        if self._done.is_set() and not live():
            return
        for execution in live():
            try:
                execution.abandon()
            except Exception as problem:
                logger.warning("run %s: it could not be let go, and lapses: %s", execution.run_id, problem)
        if not self._done.is_set():
            self.finished(Outcome("interrupted", "a step was cut off"))
        os._exit(0)
