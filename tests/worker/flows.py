"""Flows that the tests of the worker run, suspend, kill and continue. Each effect is a line in the file `EFFECTS` names."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any, Literal

from kitaru_zenml import checkpoint, event, flow, gather_runs, sleep, wait


def effects() -> Path:
    return Path(os.environ["WORKER_EFFECTS"])


def note(what: str) -> None:
    with open(effects(), "a") as file:
        file.write(f"{what}|{os.getpid()}|{time.time()}\n")


@checkpoint
def effect(run: str, what: str, seconds: float = 0.0) -> str:
    note(f"{run}|{what}")
    time.sleep(seconds)
    return what


def kill_once(run: str, where: str) -> None:
    """SIGKILL this process, the first time that this is called."""
    mark = effects().with_name(f"{effects().name}.{run}.{where}")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@flow(grace=0)
def asking(run: str) -> str:
    effect(run, "before")
    answer: str = wait("approve", schema=Literal["yes", "no"], question="Go on?")
    effect(run, f"after {answer}")
    return answer


@flow(grace=0)
def asking_twice(run: str) -> str:
    first: str = wait("first", schema=str, question="First?")
    effect(run, f"got {first}")
    second: str = wait("second", schema=str, question="Second?")
    return first + second


@flow(grace=0)
def sleeping(run: str, seconds: float) -> str:
    effect(run, "before")
    sleep(seconds)
    effect(run, "after")
    return "slept"


@flow(grace=0)
def listening(run: str, count: int) -> list[Any]:
    found: list[Any] = []
    for order in event("orders"):
        found.append(order)
        effect(run, f"order {order}")
        if len(found) == count:
            break
    return found


@flow(grace=0)
def parenting(run: str) -> list[Any]:
    results: list[Any] = gather_runs([asking.submit(f"{run}.child")])
    effect(run, "joined")
    return results


@checkpoint(at_most_once=True)
def pay(run: str) -> str:
    kill_once(run, "pay")
    return "paid"


@flow(lapse_seconds=2)
def paying(run: str) -> str:
    return pay(run)


def undo(run: str, reason: str) -> None:
    note(f"{run}|undone {reason}")


@flow(grace=0, on_cancel=undo)
def cancellable(run: str) -> str:
    effect(run, "before")
    wait("approve")
    return "never"


@flow(lapse_seconds=2)
def killed(run: str, steps: int, at: int) -> int:
    """Killed once, after so many steps."""
    for i in range(steps):
        if i == at:
            kill_once(run, "killed")
        effect(run, f"step {i}")
    return steps


@flow(lapse_seconds=2)
def deadly(run: str) -> None:
    """Kills every process that executes it."""
    effect(run, "before")
    note(f"{run}|dies")
    os.kill(os.getpid(), signal.SIGKILL)


@flow(lapse_seconds=2)
def stumbling(run: str, steps: int) -> int:
    """Killed after every step, which it stores before."""
    for i in range(steps):
        effect(run, f"step {i}")
        kill_once(run, f"step {i}")
    return steps


@flow(grace=0)
def raising(run: str) -> None:
    wait("approve")
    raise ValueError("the flow's own failure")


@flow(grace=0, lapse_seconds=2)
def slow(run: str, steps: int, seconds: float) -> int:
    wait("approve")
    for i in range(steps):
        effect(run, f"step {i}", seconds)
    return steps


@checkpoint(limit="provider")
def called(run: str, what: str, seconds: float) -> str:
    note(f"{run}|in {what}")
    time.sleep(seconds)
    note(f"{run}|out {what}")
    return what


@flow(grace=0)
def calling(run: str, calls: int, seconds: float) -> int:
    wait("approve")
    return len([f.result() for f in [called.submit(run, str(i), seconds) for i in range(calls)]])


@flow(grace=0, limit="gpu")
def training(run: str, seconds: float) -> str:
    wait("approve")
    note(f"{run}|in")
    time.sleep(seconds)
    note(f"{run}|out")
    return "trained"
