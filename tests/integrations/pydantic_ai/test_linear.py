"""A chat stores its messages once, however long it gets."""

from __future__ import annotations

import time
from typing import Any

import pytest
from pydantic_ai import Agent
from pydantic_ai.messages import ModelMessagesTypeAdapter

from kitaru_zenml_pydantic_ai import Durability
from tests.integrations.pydantic_ai.crashing import scripted
from tests.simulation import MemoryStore, run_leg

TURNS = 200
QUESTION = "And what about the next chapter of the manual, the one on valves and their seats? " * 4
ANSWER = "The chapter says that a valve seat is ground before it is lapped, and gives the angles for each size. " * 8


def chat(turns: int, one_run: bool) -> Any:
    """A chat as an agent run a turn, or as one run that calls a tool a turn."""

    def answer(messages: Any) -> Any:
        n = len(messages)
        if one_run and n < 2 * turns - 1:
            return [("look", f"call_{n}", {"query": f"{n} {QUESTION}"})]
        return f"{n}: {ANSWER}"

    agent = Agent(scripted(answer), name="chat", capabilities=[Durability()])

    @agent.tool_plain
    def look(query: str) -> str:
        return f"{query[:5]}: {ANSWER}"

    async def flow() -> int:
        if one_run:
            from pydantic_ai.usage import UsageLimits

            result = await agent.run("read it all", usage_limits=UsageLimits(request_limit=None))
        else:
            history: Any = None
            for n in range(turns):
                result = await agent.run(f"{n}: {QUESTION}", message_history=history)
                history = result.all_messages()
        return len(ModelMessagesTypeAdapter.dump_json(result.all_messages()))

    return flow


@pytest.mark.parametrize("one_run", [False, True], ids=["a run a turn", "one run with tools"])
def test_a_chat_of_200_turns_stores_its_messages_once(one_run: bool, capsys: pytest.CaptureFixture[str]) -> None:
    stored, history, seconds = {}, {}, {}
    for turns in (TURNS // 2, TURNS):
        objects: dict[str, bytes] = {}
        began = time.monotonic()
        ended, _ = run_leg(MemoryStore(objects), chat(turns, one_run))
        seconds[turns] = time.monotonic() - began
        assert ended.error is None
        history[turns], stored[turns] = ended.value, sum(len(data) for name, data in objects.items() if "/lease/" not in name)
    with capsys.disabled():
        print(
            f"\n{TURNS} turns: {stored[TURNS]:,} bytes stored for a history of {history[TURNS]:,}: "
            f"{stored[TURNS] / history[TURNS]:.2f} times; {seconds[TURNS]:.1f} s"
        )
    assert stored[TURNS] <= 3 * history[TURNS]
    assert stored[TURNS] < 2.2 * stored[TURNS // 2], "it grows faster than the chat"
