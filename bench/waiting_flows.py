"""Flows that suspend, for `suspend_resume.py`; each notes when its next step begins in the file that `BENCH_NOTES` names."""

from __future__ import annotations

import os
import time

from kitaru_zenml import checkpoint, event, flow, sleep, wait


def note(what: str) -> None:
    with open(os.environ["BENCH_NOTES"], "a") as file:
        file.write(f"{what} {time.time()}\n")


@checkpoint
def noted(what: str) -> str:
    note(what)
    return what


@flow(grace=0)
def asking(name: str) -> None:
    noted(f"{name}-before")
    wait("approve")
    noted(f"{name}-after")


@flow(grace=0)
def napping(seconds: float) -> None:
    sleep(seconds)


@flow(grace=0)
def counting(count: int) -> int:
    orders = event("orders")
    total = 0
    for i in range(count):
        total += orders.next()["n"]
        if i == 0:
            note("first-event")
    note("last-event")
    return total
