"""The flows that the benchmark runs: ours, and the same work as native steps of a ZenML dynamic pipeline."""

from __future__ import annotations

import os
import time
from typing import Any

from zenml import pipeline, step

from kitaru_zenml import checkpoint, flow

STARTS: list[float] = []  # when each body began
KILL_AT = int(os.environ.get("BENCH_KILL_AT", "0"))


def payload(size: int, i: int) -> dict[str, Any]:
    return {"i": i, "text": f"{i:08d}" * (size // 8)}


@checkpoint
def work(i: int, size: int) -> dict[str, Any]:
    STARTS.append(time.perf_counter())
    if KILL_AT and i == KILL_AT:
        os.kill(os.getpid(), 9)
    return payload(size, i)


@flow
def sequential(steps: int, size: int) -> None:
    for i in range(steps):
        work(i, size)


@flow(max_workers=16)
def concurrent(steps: int, size: int) -> None:
    for future in work.map(range(steps), size=size):
        future.result()


@checkpoint
def model(messages: list[dict[str, str]]) -> dict[str, str]:
    return {"role": "assistant", "content": f"answer {len(messages)} " * 40}


@flow
def chat(turns: int) -> int:
    messages: list[dict[str, str]] = []
    for turn in range(turns):
        messages = [*messages, {"role": "user", "content": f"question {turn} " * 40}]
        messages = [*messages, model(messages)]
    return sum(len(m["content"]) + len(m["role"]) for m in messages)


@step(enable_cache=False)
def native_work(i: int, size: int) -> dict[str, Any]:
    STARTS.append(time.perf_counter())
    return payload(size, i)


@pipeline(dynamic=True, enable_cache=False)
def native(steps: int, size: int) -> None:
    for i in range(steps):
        native_work(i=i, size=size)


@pipeline(dynamic=True, enable_cache=False)
def native_concurrent(steps: int, size: int) -> None:
    futures = [native_work.submit(i=i, size=size) for i in range(steps)]
    for future in futures:
        future.result()
