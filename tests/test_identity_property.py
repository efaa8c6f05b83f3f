"""Step identity and delivery order, held to random flows, latencies and crashes: nothing swapped, nothing twice, no false alarm.

A flow is a list of shapes. It runs, dies at a random record, and is resumed with other latencies until it ends. Every leaf step returns
its inputs and a random number, so that a result that came from another call, or a second run, shows.
"""

from __future__ import annotations

import asyncio
import collections
import random
import threading
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitaru_zenml.checkpoints import checkpoint
from kitaru_zenml.errors import InputsDrifted
from kitaru_zenml.futures import as_completed
from tests.simulation import Crash, MemoryStore, run_leg

latencies = random.Random(0)
runs: collections.Counter[Any] = collections.Counter()  # how often each outcome was made


async def latency() -> None:
    await asyncio.sleep(latencies.random() * 0.003)


def outcome(what: Any) -> list[Any]:
    made = [what, random.randrange(10**12)]
    return made


@checkpoint
async def leaf(x: Any) -> list[Any]:
    await latency()
    return outcome(x)


@checkpoint
async def outer(x: Any) -> list[Any]:
    await latency()
    return [x, [await leaf(x), await leaf(x)]]


@checkpoint
async def fan(x: Any) -> list[Any]:
    """A step that makes tasks of its own."""
    return [x, await asyncio.gather(*(leaf([x, i]) for i in range(3)))]


@checkpoint
def sync_leaf(x: Any) -> list[Any]:
    return outcome(x)


def checked(asked: Any, got: list[Any]) -> list[Any]:
    assert got[0] == asked, f"swapped: asked {asked}, got {got[0]}"
    return got


async def fetch(k: int, i: int) -> list[Any]:
    await latency()
    return checked([k, i], await leaf([k, i]))


async def gather(k: int) -> Any:
    async def fetch_and_sum(i: int) -> Any:
        got = await fetch(k, i)
        return checked(got, await leaf(got))

    return await asyncio.gather(*(fetch_and_sum(i) for i in range(6)))


async def same(k: int) -> Any:
    async def sample() -> Any:
        await latency()
        got = await leaf([k])
        await latency()
        return checked(got, await leaf(got))

    samples = await asyncio.gather(*(sample() for _ in range(5)))
    return checked(samples, await leaf(samples))


async def nest(k: int) -> Any:
    async def one(i: int) -> Any:
        await latency()
        return checked([k, i % 2], await outer([k, i % 2]))

    return await asyncio.gather(*(one(i) for i in range(4)))


async def tasks_inside(k: int) -> Any:
    first = await fan([k])
    return [first, await asyncio.gather(*(fetch(k, i) for i in range(3)))]


async def semaphore(k: int) -> Any:
    gate = asyncio.Semaphore(3)

    async def limited(i: int) -> Any:
        await latency()
        async with gate:
            return checked([k, i], await leaf([k, i]))

    return await asyncio.gather(*(limited(i) for i in range(9)))


async def reactions(k: int) -> Any:
    posts = []
    for done in asyncio.as_completed([asyncio.ensure_future(fetch(k, i)) for i in range(6)]):
        value = await done
        posts.append(asyncio.ensure_future(leaf(value)))
    return sorted(await asyncio.gather(*posts))


async def pool(k: int, step: Any = leaf, jobs: int = 8) -> Any:
    todo, got = list(range(jobs)), {}

    async def worker() -> None:
        while todo:
            i = todo.pop(0)
            await latency()
            got[i] = checked([k, i], await step([k, i]))

    await asyncio.gather(*(worker() for _ in range(3)))
    return [got[i] for i in sorted(got)]


async def nested_pool(k: int) -> Any:
    return await pool(k, outer, 6)


async def prompt_in_completion_order(k: int) -> Any:
    seen = [await done for done in asyncio.as_completed([asyncio.ensure_future(fetch(k, i)) for i in range(5)])]
    return checked(seen, await leaf(seen))


async def task_group(k: int) -> Any:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(fetch(k, i)) for i in range(4)]
    return [t.result() for t in tasks]


async def submitted(k: int) -> Any:
    futures = sync_leaf.map([[k, i] for i in range(5)])
    return [checked([k, i], await f) for i, f in enumerate(futures)]


async def sync_in_tasks(k: int) -> Any:
    async def one(i: int) -> Any:
        await latency()
        return checked([k, i], sync_leaf([k, i]))

    return await asyncio.gather(*(one(i) for i in range(4)))


async def hedge(k: int) -> Any:
    tasks = [asyncio.ensure_future(fetch(k, i)) for i in range(2)]
    _, rest = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in rest:
        task.cancel()
    await asyncio.gather(*rest, return_exceptions=True)
    return checked("hedged", await leaf("hedged"))


SHAPES = {
    f.__name__: f
    for f in (
        gather, same, nest, tasks_inside, semaphore, reactions, pool, nested_pool, prompt_in_completion_order, task_group, submitted,
        sync_in_tasks,
    )
}  # fmt: skip


async def flow(shapes: list[str]) -> Any:
    out = [await SHAPES[name](k) for k, name in enumerate(shapes)]
    return checked(out, await leaf(out))


def run_to_the_end(function: Any, parameters: dict[str, Any], crashes: list[int], seed: int) -> tuple[Any, dict[str, bytes]]:
    """Run, crash, resume; checks after each leg that no record was made twice; returns the result and the journal."""
    objects: dict[str, bytes] = {}
    for leg, crash_after in enumerate([*crashes, None]):
        latencies.seed(seed + leg)
        before = {name for name in objects if "/steps/" in name}
        store = MemoryStore(objects, crash_after=crash_after, seed=seed + leg)
        try:
            ended, execution = run_leg(store, function, parameters)
        except Crash:
            continue
        if ended.error is not None:
            raise ended.error
        finished = {name for name in before if name.rsplit("/", 1)[1] not in {f"{k}.json" for k in execution.engine.covers}}
        assert finished == before, "a finished step ran again"
        assert not execution.engine.unclaimed(), "finished steps that the finished flow never asked for"
        return ended.value, objects
    raise AssertionError("unreachable")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    shapes=st.lists(st.sampled_from(sorted(SHAPES)), min_size=1, max_size=3),
    crashes=st.lists(st.integers(0, 25), max_size=4),
    seed=st.integers(0, 10**6),
)
def test_no_call_is_swapped_repeated_or_falsely_alarmed(shapes: list[str], crashes: list[int], seed: int) -> None:
    result, objects = run_to_the_end(flow, {"shapes": shapes}, crashes, seed)
    again, _ = run_to_the_end_again(flow, {"shapes": shapes}, objects, seed + 99)
    assert again == result


def run_to_the_end_again(function: Any, parameters: dict[str, Any], objects: dict[str, bytes], seed: int) -> tuple[Any, Any]:
    """Replay a finished run without its own record: every step answers, none runs."""
    kept = {name: data for name, data in objects.items() if "/steps/simulated-" not in name and "/events/" not in name}
    latencies.seed(seed)
    ended, execution = run_leg(MemoryStore(kept, seed=seed), function, parameters)
    assert ended.error is None, ended.error
    assert execution.engine.ran == 1, "only the flow's own record is new"
    return ended.value, execution


def submitting(jobs: int) -> Any:
    """A sync flow: a pool of threads, results taken in completion order into the next step."""
    seen = [checked([f.result()[0][0]], f.result()) for f in as_completed(slow_leaf.map([[i] for i in range(jobs)]))]
    return checked(seen, sync_leaf(seen))


@checkpoint
def slow_leaf(x: Any) -> list[Any]:
    threading.Event().wait(latencies.random() * 0.003)
    return outcome(x)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(jobs=st.integers(1, 12), crashes=st.lists(st.integers(0, 12), max_size=3), seed=st.integers(0, 10**6))
def test_threads_complete_in_their_first_order(jobs: int, crashes: list[int], seed: int) -> None:
    result, objects = run_to_the_end(submitting, {"jobs": jobs}, crashes, seed)
    again, _ = run_to_the_end_again(submitting, {"jobs": jobs}, objects, seed + 99)
    assert again == result


async def drifting(k: int) -> Any:
    await leaf([k, random.random()])
    return await leaf("after")


async def drifting_inside(k: int) -> Any:
    @checkpoint
    async def slow(x: Any) -> Any:
        return [await leaf(x), await leaf([x])]

    @checkpoint
    async def around(i: int) -> Any:
        return await slow([i, random.random()])

    return await asyncio.gather(*(around(i) for i in range(2)))


async def shuffled(k: int) -> Any:
    order = list(range(6))
    random.shuffle(order)
    return [await leaf([k, i]) for i in order]


@pytest.mark.parametrize("function", [drifting, drifting_inside], ids=lambda f: f.__name__)
def test_inputs_that_change_end_in_an_alarm_and_never_hang(function: Any) -> None:
    with pytest.raises(InputsDrifted):
        run_to_the_end(function, {"k": 0}, [2], 1)
