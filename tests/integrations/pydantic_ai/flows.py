"""Agents and flows of the crash tests. The model is Pydantic AI's OpenAI model against the local server that the environment names.

Each tool leaves a line in a file before it returns, and part of what it returns is random: a tool that ran twice shows.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterable
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.messages import AgentStreamEvent, PartDeltaEvent, ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

from kitaru_zenml import flow
from kitaru_zenml_pydantic_ai import Durability
from tests.crash.flows import effect


def openai_model(name: str = "gpt-test") -> OpenAIChatModel:
    """A model of the local server; the client tries once, so that requests are counted by what we do."""
    from openai import AsyncOpenAI

    client = AsyncOpenAI(base_url=os.environ.get("OPENAI_TEST_URL", "http://127.0.0.1:9/v1"), api_key="none", max_retries=0)
    return OpenAIChatModel(name, provider=OpenAIProvider(openai_client=client))


async def _to_file(ctx: RunContext[Any], events: AsyncIterable[AgentStreamEvent]) -> None:
    async for event in events:
        if isinstance(event, PartDeltaEvent) and (path := os.environ.get("DELTAS")):
            with open(path, "a") as file:
                file.write(f"{event.event_kind}\n")


def _ask(ctx: RunContext[Any], requests: Any, token: str) -> None:
    return None


reviewer = Agent(openai_model(), name="reviewer", instructions="You are the reviewer.", capabilities=[Durability()])


@reviewer.tool_plain
def read_policy(topic: str) -> str:
    return f"policy {effect(f'policy {topic}')}"


support = Agent(
    openai_model(),
    name="support",
    instructions="You are the support agent.",
    capabilities=[RequestInput(_ask), Durability(event_stream_handler=_to_file)],
)


@support.tool
async def lookup(ctx: RunContext[None], what: str) -> list[Any]:
    await asyncio.sleep(random.random() * 0.01)
    return effect(f"lookup {what}")


@support.tool
async def review(ctx: RunContext[None], text: str) -> str:
    result = await reviewer.run(text, usage=ctx.usage)
    effect("review")
    return result.output


@support.tool_plain(requires_approval=True)
def refund(amount: int) -> list[Any]:
    return effect(f"refund {amount}")


@support.tool_plain(requires_approval=True)
def notify(whom: str) -> list[Any]:
    return effect(f"notify {whom}")


clerk = Agent(openai_model(), name="clerk", instructions="You are the clerk.", capabilities=[Durability()])


@clerk.tool_plain
def book(amount: int) -> list[Any]:
    return effect(f"book {amount}")


class Story(BaseModel):
    """What a run came to, without what is random or a time."""

    output: str
    requests: int
    tool_calls: int
    input_tokens: int
    output_tokens: int
    roles: list[str]
    returns: list[str]


def story(result: Any) -> dict[str, Any]:
    """The comparable part of a result."""
    usage, messages = result.usage, result.all_messages()
    returns = [p.tool_call_id for m in messages for p in m.parts if isinstance(p, ToolReturnPart)]
    return Story(
        output=result.output, requests=usage.requests, tool_calls=usage.tool_calls, input_tokens=usage.input_tokens,
        output_tokens=usage.output_tokens, roles=[p.part_kind for m in messages for p in m.parts], returns=returns,
    ).model_dump()  # fmt: skip


@flow
def clerk_flow() -> str:
    return clerk.run_sync("book it").output.split("[")[0]


@flow
async def asking(model: str = "gpt-test") -> str:
    """A flow whose model is an input."""
    return (await clerk.run("book it", model=openai_model(model))).output.split("[")[0]


@flow
async def two_clerks() -> list[str]:
    results = await asyncio.gather(clerk.run("book it"), clerk.run("book it"))
    return [r.output for r in results]


@flow(grace=0.2)
async def support_flow() -> dict[str, Any]:
    return story(await support.run("I want my money back"))
