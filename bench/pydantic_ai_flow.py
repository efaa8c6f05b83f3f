"""The flow of `pydantic_ai_overhead`, in a module of its own so that a resume finds it."""

from __future__ import annotations

from pydantic_ai_overhead import agent_with, talk

from kitaru_zenml import flow
from kitaru_zenml_pydantic_ai import Durability

agent = agent_with(Durability())


@flow
async def bench() -> float:
    return await talk(agent)
