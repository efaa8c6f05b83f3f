"""The flows of the soak. Every body leaves a line when it has taken effect, with the process that did it."""

from __future__ import annotations

import asyncio
import os
import random
import time
from typing import Any

from kitaru_zenml import checkpoint, current_step, event, flow, gather_runs, sleep, wait


def effect(what: str) -> str:
    step = current_step()
    handle = os.open(os.environ["SOAK_EFFECTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, f"{step.run_id}|{step.path}|{os.getpid()}|{what}\n".encode())
    os.close(handle)
    return what


@checkpoint
def work(what: str) -> str:
    time.sleep(random.random() * 0.05)
    return effect(what)


@checkpoint
async def work_async(what: str) -> str:
    await asyncio.sleep(random.random() * 0.05)
    return effect(what)


@flow(grace=0)
def steps(n: int) -> str:
    return ",".join(work(f"{n}.{i}") for i in range(8))


@flow(grace=0)
async def asking(n: int) -> str:
    async def branch(i: int) -> str:
        before = await work_async(f"{n}.{i}")
        answer = await wait("approve", schema=str, question=f"{n}.{i}")
        return f"{before}={await work_async(f'{n}.{i} {answer}')}"

    return ",".join(await asyncio.gather(*(branch(i) for i in range(2))))


@flow(grace=0)
def waking(n: int) -> str:
    first = work(f"{n} before")
    sleep(1 + n % 3)
    return f"{first},{work(f'{n} after')}"


@flow(grace=0)
def listening(n: int) -> str:
    orders = event("orders")
    return ",".join(work(f"{n} {orders.next()}") for _ in range(3))


@flow(grace=0)
def child(n: int) -> str:
    return work(f"child {n}")


@flow(grace=0, max_children=2)
def parent(n: int) -> str:
    return ",".join(gather_runs(child.submit(10 * n + i) for i in range(2)))


def expected(name: str, n: int) -> str:
    """What a run returns, whatever was killed."""
    match name:
        case "steps":
            return ",".join(f"{n}.{i}" for i in range(8))
        case "asking":
            return ",".join(f"{n}.{i}={n}.{i} to {n}.{i}" for i in range(2))
        case "waking":
            return f"{n} before,{n} after"
        case "listening":
            return ",".join(f"{n} order {i}" for i in range(3))
        case _:
            return ",".join(f"child {10 * n + i}" for i in range(2))


FLOWS: dict[str, Any] = {"steps": steps, "asking": asking, "waking": waking, "listening": listening, "parent": parent}
