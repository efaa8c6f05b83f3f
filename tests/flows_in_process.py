"""Flows that tests run in their own process."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import BaseModel

from kitaru_zenml import checkpoint, current_step, flow, now


class Finding(BaseModel):
    title: str
    score: float


@checkpoint
def double(x: int) -> int:
    return 2 * x


@checkpoint
async def double_async(x: int) -> int:
    await asyncio.sleep(0.01)
    return 2 * x


@flow
def doubling(n: int) -> int:
    return sum(double(i) for i in range(n)) + sum(f.result() for f in double.map(range(n)))


@flow
async def doubling_async(n: int) -> int:
    return sum(await asyncio.gather(*(double_async(i) for i in range(n))))


@flow
def lost_context() -> list[str]:
    found = []
    with ThreadPoolExecutor(1) as pool:
        for name, work in (
            ("bare", lambda: double(1)),
            ("copied", lambda context=copy_context(): context.run(double, 2)),
        ):
            try:
                found.append(f"{name} {pool.submit(work).result()}")
            except Exception as error:
                found.append(f"{name} {type(error).__name__}")
    return found


@flow
async def lost_context_async() -> list[str]:
    loop, found = asyncio.get_running_loop(), []
    try:
        found.append(str(await loop.run_in_executor(None, double, 1)))
    except Exception as error:
        found.append(type(error).__name__)
    found.append(str(await asyncio.to_thread(double, 2)))
    return found


@checkpoint
def find(topic: str) -> Finding:
    current_step().log_usage("model-x", input_tokens=10, output_tokens=5, cost=0.01)
    current_step().log_metadata(source="web")
    return Finding(title=topic * 30, score=0.5)


@checkpoint
def summarise(findings: list[Finding], by: dict[str, Finding]) -> str:
    return ", ".join(f.title for f in findings)


@checkpoint
def table(n: int) -> pd.DataFrame:
    return pd.DataFrame({"a": range(n)})


@checkpoint
def vector(frame: pd.DataFrame) -> np.ndarray[Any, Any]:
    return frame["a"].to_numpy()


@checkpoint
def note(folder: str) -> Path:
    path = Path(folder) / "note.txt"
    path.write_text("hello")
    return path


@flow
def research(folder: str) -> str:
    findings = [f.result() for f in find.map(["ants", "bees"])]
    text = summarise(findings, {"first": findings[0]})
    total = int(vector(table(4)).sum())
    return f"{text} {total} {note(folder).read_text()} {now().year}"


@checkpoint(retries=1, retry_delay=0.01)
def never() -> None:
    raise ConnectionError("the model is down")


@flow
def failing() -> None:
    double(1)
    never()


@flow
def slow_steps(n: int, seconds: float) -> int:
    for i in range(n):
        nap(i, seconds)
    return n


@checkpoint
def nap(i: int, seconds: float) -> int:
    time.sleep(seconds)
    return i


@flow(lineage="sync")
def in_step_with_zenml(n: int) -> list[int]:
    return [registered_so_far(i) for i in range(n)]


@checkpoint
def registered_so_far(i: int) -> int:
    from zenml.client import Client

    return int(Client().list_run_steps(pipeline_run_id=current_step().run_id, size=1).total)


@checkpoint(isolated=True)
def heavy(x: int) -> int:
    return x + 1


@flow
def with_heavy(x: int) -> int:
    return heavy(double(x))


@flow
def registered_in_time(n: int) -> list[int]:
    return [registered_so_far(i) for i in range(n)]
