"""Flows that wait, for tests in their own process. Each body appends to the file `EFFECTS` names."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, field_validator

from kitaru_zenml import WaitTimedOut, checkpoint, event, flow, gather_runs, sleep, sleep_until, wait


def effect(what: str) -> None:
    with open(os.environ["EFFECTS"], "a") as file:
        file.write(what + "\n")


class Decision(BaseModel):
    ok: bool
    limit: Annotated[int, Field(ge=0, le=100)] = 0

    @field_validator("limit")
    @classmethod
    def _even(cls, limit: int) -> int:
        if limit % 2:
            raise ValueError("the limit must be even")  # what a JSON schema cannot say
        return limit


@checkpoint
def prepare(x: int) -> int:
    effect(f"prepare {x}")
    return x + 1


@checkpoint
def spend(x: int, ok: bool) -> str:
    effect(f"spend {x}")
    return f"spent {x}" if ok else "kept"


@flow(grace=0)
def asking(x: int) -> str:
    amount = prepare(x)
    decision = wait("approve", schema=Decision, question=f"Spend {amount}?", metadata={"amount": amount})
    return spend(amount, decision.ok)


@checkpoint
async def refund(order: int) -> str:
    prepared = await asyncio.to_thread(prepare, order)
    answer = await wait("approve", schema=Literal["yes", "no"], question=f"Refund order {order}?")
    effect(f"refund {order} {answer}")
    return f"{prepared}:{answer}"


@flow(grace=0)
async def asking_in_branches(n: int) -> list[str]:
    return list(await asyncio.gather(*(refund(i) for i in range(n))))


@flow(grace=2)
async def asking_in_another_order() -> list[str]:
    """Asks for `left` first in its first leg, and last in every other."""
    again = os.path.exists(os.environ["EFFECTS"] + ".asked")
    open(os.environ["EFFECTS"] + ".asked", "a").close()

    async def ask(name: str, delay: float) -> str:
        await asyncio.sleep(delay)
        return str(await wait(name, schema=str))

    return list(await asyncio.gather(ask("left", 1.0 if again else 0.0), ask("right", 0.0 if again else 1.0)))


@checkpoint
def ask_in_step(name: str) -> Any:
    first = prepare(1)
    answer = wait(name, schema=list[int])
    effect(f"after {name}")
    return [first, *answer]


@flow(grace=0)
def asking_in_steps() -> list[Any]:
    futures = [ask_in_step.submit(name) for name in ("left", "right")]
    return [future.result() for future in futures]


@flow(grace=0)
def asking_with_timeout(seconds: float, default: bool) -> str:
    try:
        extra = {"default": "nobody"} if default else {}
        return str(wait("name", schema=str, timeout=seconds, **extra))
    except WaitTimedOut:
        return "timed out"


@flow(grace=0)
def gate() -> str:
    wait("go")
    return "gone"


@flow(grace=0)
def napping(seconds: float) -> str:
    sleep(timedelta(seconds=seconds))
    sleep_until(datetime(2020, 1, 1, tzinfo=UTC))
    return "rested"


@checkpoint
def take(order: Any) -> Any:
    effect(f"take {order}")
    return order


@flow(grace=0)
def listening(n: int) -> list[Any]:
    orders = event("orders")
    return [take(orders.next()) for _ in range(n)]


@flow(grace=0)
async def listening_async() -> list[Any]:
    seen = []
    async for order in event("orders"):
        if order == "close":
            break
        seen.append(order)
    return seen


def undo(x: int, reason: str) -> str:
    effect(f"undo {x} {reason}")
    return "undone"


@flow(grace=0, on_cancel=undo)
def undoable(x: int) -> str:
    prepare(x)
    wait("approve")
    return "done"


@flow(grace=0)
def child(i: int, ask: bool = False) -> int:
    if ask:
        wait("child")
    return child_work(i)


@checkpoint
def child_work(i: int) -> int:
    effect(f"child {i}")
    if i == 13 and not os.path.exists(os.environ["EFFECTS"] + ".mended"):
        raise ValueError("unlucky")
    return i * i


@flow(grace=0, max_children=4)
def parent(n: int, ask: bool = False) -> int:
    return int(sum(gather_runs(child.submit(i, ask=ask) for i in range(n))))


@flow(grace=0)
async def parent_async(n: int) -> int:
    handles = [child.submit(i) for i in range(n)]
    squares = await gather_runs(handles)
    last = await child.run_async(n)
    return int(sum(squares)) + last.result()


@flow(grace=0)
def unlucky(forgiving: bool) -> list[str]:
    handles = [child.submit(12), child.submit(13)]
    return [str(result) for result in gather_runs(handles, return_exceptions=forgiving)]


@checkpoint
def ask(name: str) -> str:
    return str(wait(name, schema=str))


@flow(grace=None)
def broken(error: str) -> str:
    answer = ask.submit("approve")
    time.sleep(2)
    if not os.path.exists(os.environ["EFFECTS"] + ".mended"):
        raise KeyboardInterrupt if error == "ctrl-c" else ValueError(error)
    return answer.result()


@checkpoint
def until_told(i: int) -> int:
    effect(f"slow {i}")
    while not os.path.exists(os.environ["EFFECTS"] + ".told"):
        time.sleep(0.05)
    return i


@flow(grace=0)
def slow_child(i: int) -> int:
    return until_told(i) + child_work(i)


@flow(grace=0, max_children=1)
def queueing(n: int) -> int:
    return int(sum(gather_runs(slow_child.submit(i) for i in range(n))))
