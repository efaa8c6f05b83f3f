"""Pydantic AI agents as durable flows: every model call and tool call is a step of the run.

Example:
    agent = Agent("openai:gpt-5", name="support", capabilities=[Durability()])

    @flow
    async def handle(ticket: str) -> str:
        return (await agent.run(ticket)).output
"""

from __future__ import annotations

from kitaru_zenml_pydantic_ai.approvals import Decision
from kitaru_zenml_pydantic_ai.capability import Durability
from kitaru_zenml_pydantic_ai.options import StepConfig

__all__ = ["Decision", "Durability", "StepConfig"]
