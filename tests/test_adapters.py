"""Scopes and steps as an adapter makes them: two equal agents do not swap, keyed calls find their records, a crash repeats nothing."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest

from kitaru_zenml.adapters import Step, derived_id, in_run, last_record, run_step, run_step_sync, scope, scope_sync
from kitaru_zenml.errors import InputsDrifted, NotInRun
from kitaru_zenml.journal.records import StepRecord, unseal
from tests.simulation import Crash, MemoryStore, run_leg

ran: Counter[str] = Counter()


async def agent(prompt: str, seed: random.Random) -> list[str]:
    """An agent run: requests one after another, and tools in between, in parallel."""
    answers = []
    async with scope("support", {"prompt": prompt}, kind="agent"):
        for turn in range(3):
            answers.append(
                await run_step(Step("model", {"messages": [prompt, *answers]}, kind="model"), lambda: call(prompt, seed))
            )
            tools = (
                run_step(
                    Step(f"tool:{name}", {"turn": turn}, key=f"call_{turn}", kind="tool"), lambda: call(f"{prompt} tool", seed)
                )
                for name in ("a", "b")
            )
            answers += await asyncio.gather(*tools)
    return answers


async def call(what: str, seed: random.Random) -> str:
    ran[what] += 1
    await asyncio.sleep(seed.random() * 0.003)
    return f"{what}: {ran.total()}"


def test_equal_and_different_agents_in_a_gather_keep_their_own_through_crashes() -> None:
    for seed in range(15):
        choose, objects = random.Random(seed), dict[str, bytes]()

        async def flow(choose: random.Random = choose) -> Any:
            return await asyncio.gather(*(agent(p, choose) for p in ("same", "same", "other")))

        ran.clear()
        while True:
            try:
                ended, _ = run_leg(MemoryStore(objects, crash_after=choose.randint(0, 9), seed=choose.random()), flow)
            except Crash:
                continue
            break
        assert ended.error is None, ended.error
        for answers, prompt in zip(ended.value, ("same", "same", "other"), strict=True):
            assert len(answers) == 9 and all(text.startswith(prompt) for text in answers)
        assert len({tuple(a) for a in ended.value}) == 3, "one agent got another's answers"


def test_a_scope_may_be_opened_by_blocking_code() -> None:
    objects: dict[str, bytes] = {}

    def flow() -> list[int]:
        found = []
        for _ in range(2):
            with scope_sync("graph", {}, kind="graph"):
                found.append(run_step_sync(Step("node", key="n"), lambda: len(found)))
        return found

    ended, first = run_leg(MemoryStore(objects), flow)
    assert ended.value == [0, 1]
    objects = {name: data for name, data in objects.items() if "/flow-" not in name and "simulated" not in name}
    ended, again = run_leg(MemoryStore(objects), flow)
    assert ended.value == [0, 1] and (again.engine.replayed, first.engine.replayed) == (2, 0)


def test_a_keyed_step_with_other_inputs_is_drift_unless_they_are_volatile() -> None:
    objects: dict[str, bytes] = {}

    def flow_of(value: int, volatile: tuple[str, ...]) -> Any:
        return lambda: run_step_sync(Step("tool", {"value": value}, key="call_1", volatile=volatile), lambda: value)

    assert run_leg(MemoryStore(objects), flow_of(1, ("value",)))[0].value == 1
    objects = {name: data for name, data in objects.items() if "simulated" not in name}
    assert run_leg(MemoryStore(dict(objects)), flow_of(2, ("value",)))[0].value == 1
    assert isinstance(run_leg(MemoryStore(dict(objects)), flow_of(2, ()))[0].error, InputsDrifted)


def test_outside_a_run_an_adapter_is_told_so() -> None:
    assert not in_run()
    with pytest.raises(NotInRun):
        run_step_sync(Step("tool"), lambda: 1)


def test_derived_ids_are_the_same_on_a_replay_and_differ_from_each_other() -> None:
    objects: dict[str, bytes] = {}

    async def flow() -> list[str]:
        found = [derived_id("agent"), derived_id("agent")]
        async with scope("outer", {}, kind="agent"):
            found.append(derived_id("agent"))
        return found

    first = run_leg(MemoryStore(objects), flow)[0].value
    objects = {name: data for name, data in objects.items() if "simulated" not in name}
    assert run_leg(MemoryStore(objects), flow)[0].value == first and len(set(first)) == 3


def test_a_step_follows_the_records_that_it_names() -> None:
    async def flow() -> None:
        async with scope("agent", {}, kind="agent"):
            keys = []

            async def model() -> None:
                await run_step(Step("model"), lambda: call("m", random.Random(0)))
                keys.append(last_record())

            await asyncio.create_task(model())  # whose own branch alone knows what it got
            await run_step(Step("tool", key="t", after=tuple(k for k in keys if k)), lambda: call("t", random.Random(0)))

    objects: dict[str, bytes] = {}
    run_leg(MemoryStore(objects), flow)
    found = [unseal(StepRecord, data, name) for name, data in objects.items() if "/steps/" in name]
    [model_record], [tool_record] = ([r for r in found if r.name == name] for name in ("model", "tool"))
    assert tool_record.after == (model_record.object_key,)
