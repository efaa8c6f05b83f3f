"""Runs each operation of Pydantic AI as a step of the runtime: what is recorded for it, and what a replay makes of that."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError
from pydantic_ai.durable_exec import (
    JSON_CODEC,
    DurableOperationId,
    JournalCallableOperationBackend,
    ModelCompactMessagesId,
    ModelRequestId,
    ToolsetCallToolId,
    ToolsetValidateToolArgumentsId,
    record_durable_unit,
)
from pydantic_ai.messages import ModelResponse
from pydantic_ai.tools import RunContext
from pydantic_ai.usage import RunUsage

from kitaru_zenml.adapters import Step, current_step, last_record, run_step
from kitaru_zenml.options import StepOptions
from kitaru_zenml_pydantic_ai.failures import give_streamed, keep_streamed
from kitaru_zenml_pydantic_ai.messages import compact_response, cost_of, facts, response_of
from kitaru_zenml_pydantic_ai.options import Redact, StepSettings
from kitaru_zenml_pydantic_ai.outcomes import Outcome, UnreadableOutcome, tool_outcome
from kitaru_zenml_pydantic_ai.steps import step_of

Body = Callable[[], Awaitable[Any]]


@dataclass
class Turn:
    """Which records the next steps of an agent run follow: tools the model step that asked for them, a model step those tools."""

    model: tuple[str, ...] = ()
    tools: tuple[str, ...] = ()


turn: ContextVar[Turn | None] = ContextVar("kitaru_pydantic_ai_turn", default=None)


class StepBackend(JournalCallableOperationBackend[StepOptions]):
    """`execute` for every operation that `BaseDurabilityCapability` routes."""

    def __init__(self, *, agent_name: str, config: StepSettings, redact: Redact | None) -> None:
        super().__init__(agent_name=agent_name, config=config)
        self._redact = redact

    async def execute(
        self,
        *,
        operation_id: DurableOperationId,
        name: str,
        body: Body,
        cache_key: tuple[object, ...],
        config: StepOptions,
    ) -> object:
        """Replay or run an operation; see the base."""
        step = self._redacted(step_of(operation_id, cache_key, name, config))
        ran = False

        async def noticed() -> Any:
            nonlocal ran
            ran = True
            return await body()

        try:
            match operation_id:
                case ModelRequestId() | ModelCompactMessagesId():
                    return await _model_step(step, noticed)
                case ToolsetCallToolId():
                    return await _tool_step(step, _context(cache_key), noticed)
                case ToolsetValidateToolArgumentsId():
                    return await _validation_step(step, noticed)
                case _:
                    return await run_step(step, noticed)
        finally:
            record_durable_unit(executed=ran)  # spans and metrics of what was only replayed are not sent again

    def _redacted(self, step: Step) -> Step:
        if self._redact is None:
            return step
        inputs = self._redact(step.name, copy.deepcopy(dict(step.inputs)))
        changed = sorted(name for name in {*step.inputs, *inputs} if step.inputs.get(name) != inputs.get(name))
        if not changed:
            return step
        metadata = (*step.options.metadata, ("redacted", changed))
        return replace(step, inputs=inputs, options=replace(step.options, metadata=metadata))


async def _model_step(step: Step, body: Body) -> Any:
    async def counted() -> Any:
        try:
            dumped = await body()
        except Exception as error:
            keep_streamed(error)
            raise
        response = JSON_CODEC.load(ModelResponse, dumped)
        usage = response.usage
        current_step().log_usage(
            response.model_name or step.inputs.get("model", ""), usage.input_tokens, usage.output_tokens, cost_of(response)
        )
        current_step().log_metadata(**facts(response))
        return compact_response(dumped)

    at = turn.get() or Turn()
    try:
        recorded = response_of(await run_step(replace(step, after=at.tools), counted))
    except Exception as error:
        give_streamed(error)
        raise
    at.model, at.tools = _last(), ()
    try:
        JSON_CODEC.load(ModelResponse, recorded)
    except ValidationError as error:
        raise UnreadableOutcome(f"the model step `{step.name}`", str(error)) from None
    return recorded


async def _tool_step(step: Step, ctx: RunContext[Any], body: Body) -> Outcome:
    shared = ctx.usage  # of the whole agent run, and of tools that run beside this one

    async def counted() -> Any:
        # A sub-agent counts on a copy, so that what it consumed can be told apart, recorded, and counted again on a replay.
        own, before = copy.deepcopy(shared), copy.deepcopy(shared)
        ctx.usage = own
        try:
            payload = await body()
        finally:
            ctx.usage = shared
        current_step().log_metadata(tool=ctx.tool_name, tool_call_id=ctx.tool_call_id)
        return tool_outcome(payload, own - before)

    at = turn.get() or Turn()
    outcome = Outcome(await run_step(replace(step, after=at.model), counted))
    at.tools = (*at.tools, *_last())
    if outcome.usage is not None:
        shared.incr(outcome.usage)
    return outcome


async def _validation_step(step: Step, body: Body) -> Outcome:
    async def validated() -> Any:
        return tool_outcome(await body(), RunUsage())

    return Outcome(await run_step(step, validated))


def _last() -> tuple[str, ...]:
    key = last_record()
    return () if key is None else (key,)


def _context(cache_key: tuple[object, ...]) -> RunContext[Any]:
    return next(part for part in cache_key if isinstance(part, RunContext))
