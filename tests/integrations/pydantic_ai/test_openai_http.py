"""Pydantic AI's real OpenAI model over HTTP: requests are counted, and after any crash they are as many as the model steps."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.capabilities import ModelFallback
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from kitaru_zenml.errors import StepTimeout
from kitaru_zenml_pydantic_ai import Durability
from tests.integrations.pydantic_ai.crashing import mark, ran, records, story, survives, whole
from tests.openai_server import Answer, OpenAIServer, serving, texts
from tests.simulation import Crash, MemoryStore, run_leg


def tea_script(request: dict[str, Any]) -> Answer:
    if request["model"] == "broken":
        return Answer(status=503)
    if request["model"] == "slow":
        return Answer(text="at last", delay=1.0)
    if request["model"] == "cut":
        return Answer(text="one two three four", breaks_after=3)
    if not texts(request, "assistant"):
        return Answer(tools=[("c1", "price", {"item": "tea"}), ("c2", "price", {"item": "cake"})])
    return Answer(text="together " + " and ".join(texts(request, "tool")))


@pytest.fixture
def server() -> Any:
    with serving(tea_script) as server:
        yield server


def model(server: OpenAIServer, name: str = "gpt-4o") -> OpenAIChatModel:
    client = AsyncOpenAI(base_url=server.base_url, api_key="none", max_retries=0)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


def shop(server: OpenAIServer, **durability: Any) -> Agent[Any, Any]:
    agent = Agent(name="shop", capabilities=[Durability(**durability)])

    @agent.tool_plain
    async def price(item: str) -> str:
        mark()
        return f"{item} for 3"

    return agent


def flow_of(agent: Agent[Any, Any], server: OpenAIServer, name: str = "gpt-4o") -> Any:
    async def flow() -> Any:  # a client belongs to its loop, so each leg makes its own
        return story(await agent.run("what do tea and cake cost?", model=model(server, name)))

    return flow


@pytest.mark.parametrize("streamed", [False, True])
def test_the_server_counts_as_many_requests_as_there_are_model_steps(server: OpenAIServer, streamed: bool) -> None:
    heard: list[str] = []

    async def hear(ctx: Any, events: Any) -> None:
        async for event in events:
            heard.append(event.event_kind)

    flow = flow_of(shop(server, **({"event_stream_handler": hear} if streamed else {})), server)
    value, found, _ = whole(flow)
    assert value["output"] == "together tea for 3 and cake for 3" and len(server.requests) == 2
    assert not streamed or "part_delta" in heard
    for crash_after in range(len(found)):
        objects: dict[str, bytes] = {}
        before = len(server.requests)
        with contextlib.suppress(Crash):
            run_leg(MemoryStore(objects, crash_after=crash_after), flow)
        stood = sum(r.kind == "model" for r in records(objects).values())
        first = len(server.requests) - before
        ended, _ = run_leg(MemoryStore(objects), flow)
        assert ended.value == value
        assert len(server.requests) - before - first == 2 - stood, "a model call that stood was made again, or one is missing"


def test_the_cost_of_a_priced_model_is_recorded(server: OpenAIServer) -> None:
    _, found, _ = whole(flow_of(shop(server), server))
    usages = [r.usage for r in found.values() if r.kind == "model"]
    assert all(u is not None and u.cost and u.cost > 0 and u.input_tokens for u in usages)


def test_a_failing_server_before_a_fallback(server: OpenAIServer) -> None:
    async def flow() -> Any:
        fallback: ModelFallback[Any] = ModelFallback(model(server, "broken"), model(server, "slow"))
        return (await Agent(name="shop", capabilities=[fallback, Durability()]).run("go")).output

    value, _ = survives(flow)
    assert value == "at last"


def test_a_failure_that_ends_the_run_keeps_its_class(server: OpenAIServer) -> None:
    async def flow() -> Any:
        try:
            await shop(server).run("go", model=model(server, "broken"))
        except ModelHTTPError as error:
            return [error.status_code, error.model_name]
        return None

    assert survives(flow)[0] == [503, "broken"] and ran == []


def test_retries_of_the_step_come_on_top_of_the_clients(server: OpenAIServer) -> None:
    agent = shop(server, model_steps={"retries": 2, "retry_delay": 0.01, "retry_on": ModelAPIError})

    async def flow() -> Any:
        with pytest.raises(ModelHTTPError):
            await agent.run("go", model=model(server, "broken"))

    _, found, _ = whole(flow)
    assert len(server.requests) == 3 and [len(r.attempts) for r in found.values() if r.kind == "model"] == [2]


def test_a_slow_server_is_given_up_after_the_steps_timeout(server: OpenAIServer) -> None:
    agent = shop(server, model_steps={"timeout": 0.2})

    async def flow() -> Any:
        with pytest.raises(StepTimeout):
            await agent.run("go", model=model(server, "slow"))

    whole(flow)


def test_a_stream_that_breaks_is_replayed_as_one_that_broke(server: OpenAIServer) -> None:
    async def hear(ctx: Any, events: Any) -> None:
        async for _ in events:
            pass

    agent = shop(server, event_stream_handler=hear)

    async def flow() -> Any:
        try:
            return (await agent.run("go", model=model(server, "cut"))).output
        except Exception as error:
            return [type(error).__name__, "streamed" in vars(error)]

    assert survives(flow)[0] == ["ModelConnectionError", True]
