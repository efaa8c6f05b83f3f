"""The flows of the crash tests. Each body leaves a line in a file before it returns, and part of what it returns is random: a step that
ran twice, or an outcome that came from elsewhere, shows.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from pathlib import Path
from typing import Any

from kitaru_zenml import checkpoint, current_step, event, flow, gather_runs, sleep, wait


def effect(what: str) -> list[Any]:
    """An effect on the outside world, and its receipt."""
    step = current_step()
    line = f"{step.path}|{step.idempotency_key}|{os.getpid()}|{what}\n"
    handle = os.open(os.environ["CRASH_EFFECTS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, line.encode())
    os.close(handle)
    return [what, random.randrange(10**12)]


def pause() -> None:
    """Keep a leg alive for as long as a test says."""
    if seconds := float(os.environ.get("CRASH_STEP_SECONDS", "0")):
        time.sleep(seconds)


@checkpoint
def call(what: str) -> list[Any]:
    pause()
    return effect(what)


@checkpoint
async def call_async(what: str) -> list[Any]:
    await asyncio.sleep(random.random() * 0.01)
    return effect(what)


@checkpoint
async def outer_async(what: str) -> list[Any]:
    inner = await asyncio.gather(call_async(f"{what} left"), call_async(f"{what} right"))
    return [what, *inner, await call_async(f"{what} sum")]


@checkpoint
def broken(what: str) -> None:
    effect(what)
    raise LookupError(f"no {what}")


@checkpoint(retries=2, retry_delay=0.01)
def flaky(what: str) -> list[Any]:
    if current_step().attempt < 3:
        raise ConnectionError("not yet")
    return effect(what)


@checkpoint(retries=1, retry_delay=0.01)
def flaky_around(what: str) -> list[Any]:
    first = call(f"{what} inside")
    if current_step().attempt < 2:
        raise ConnectionError("not yet")
    return [what, first]


@checkpoint(at_most_once=True)
def pay(what: str) -> list[Any]:
    return effect(what)


@flow
def sequential(steps: int = 5) -> list[Any]:
    return [call(f"step {i}") for i in range(steps)]


@flow
async def concurrent() -> list[Any]:
    first = await asyncio.gather(*(call_async(f"a{i}") for i in range(3)))
    seen = []
    for done in asyncio.as_completed([asyncio.ensure_future(outer_async(f"b{i}")) for i in range(2)]):
        seen.append(await done)
    return [first, sorted(seen), await call_async("last")]


@flow
def fan_out() -> list[Any]:
    return [future.result() for future in call.map([f"item {i}" for i in range(6)])]


@flow
def catching() -> list[Any]:
    try:
        broken("coal")
    except LookupError as error:
        return [call("before"), call(f"{type(error).__name__}: {error}")]
    return []


@flow
def retrying() -> list[Any]:
    return [call("before"), flaky("moody"), flaky_around("nested"), call("after")]


@flow
def paying() -> list[Any]:
    return [call("before"), pay("100 euro"), call("after")]


@flow
def failing_once() -> list[Any]:
    """Ends with a failure until a file says otherwise."""
    return [call("before"), moody("fails at first")]


@checkpoint
def moody(what: str) -> list[Any]:
    if not Path(os.environ["CRASH_EFFECTS"]).with_suffix(".mended").exists():
        raise OSError("not today")
    return effect(what)


def told_failure(error: BaseException | None) -> None:
    """ZenML's failure hook of the flow below."""
    with open(os.environ["CRASH_EFFECTS"] + ".hooks", "a") as file:
        file.write(f"{os.getpid()} {error!r}\n")


@flow(lapse_seconds=2, on_failure=told_failure)
def stoppable(steps: int = 12) -> list[Any]:
    return [call(f"step {i}") for i in range(steps)]


# --- flows that suspend --------------------------------------------------------------------------------------------------


@checkpoint
async def asks_inside(what: str) -> list[Any]:
    first = await call_async(f"{what} inside")
    return [first, await wait("inner", schema=str, question=f"inner {what}")]


@flow(grace=0)
async def waiting() -> list[Any]:
    async def branch(i: int) -> list[Any]:
        first = await call_async(f"before {i}")
        answer = await wait("approve", schema=str, question=f"branch {i}")
        return [first, answer, await call_async(f"after {i} {answer}")]

    results = await asyncio.gather(branch(0), branch(1), asks_inside("nested"))
    await sleep(0.2)
    order = await event("orders").next()
    return [results, order, await call_async(f"last {order}")]


@flow(grace=0)
def childing(i: int) -> list[Any]:
    return call(f"child {i}")


@flow(grace=0)
def parenting() -> list[Any]:
    handles = [childing.submit(i) for i in range(2)]
    return [call("meanwhile"), gather_runs(handles), call("joined")]


def undo(reason: str) -> list[Any]:
    return effect(f"undo {reason}")


@flow(grace=0, on_cancel=undo)
def undoable() -> list[Any]:
    first = call("before")
    wait("approve", schema=str)
    return [first, call("after")]
