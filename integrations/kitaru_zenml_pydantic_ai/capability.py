"""`Durability`: the capability that makes an agent's model and tool calls steps of the run it is called in.

It stands on Pydantic AI's public base for durable engines; what is ours is the scope of an agent run, the backend that runs steps, and
what other engines leave out: output functions, custom toolsets, run-time models, waits inside sub-agents.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

from pydantic_ai.agent import Agent, EventStreamHandler
from pydantic_ai.agent.abstract import AbstractAgent
from pydantic_ai.capabilities import ModelFallback, RequestInput
from pydantic_ai.capabilities.abstract import CapabilityOrdering, WrapRunHandler
from pydantic_ai.durable_exec import (
    JSON_CODEC,
    BaseDurabilityCapability,
    CallToolResult,
    DurabilityEngineSpec,
    conversation_id_from_run_id,
    external_event_scope,
    replay_scope,
)
from pydantic_ai.durable_exec._base import _TypedResultCodec
from pydantic_ai.durable_exec._operation_backend import _IN_DURABLE_UNIT
from pydantic_ai.exceptions import UserError
from pydantic_ai.models import Model
from pydantic_ai.output import OutputContext
from pydantic_ai.run import AgentRunResult
from pydantic_ai.tools import AgentDepsT, DeferredToolRequests, DeferredToolResults, RunContext

from kitaru_zenml import adapters, sleep
from kitaru_zenml.adapters import Step, run_step
from kitaru_zenml_pydantic_ai.approvals import RuntimeWaiter, pending_requests
from kitaru_zenml_pydantic_ai.backend import StepBackend, Turn, turn
from kitaru_zenml_pydantic_ai.failures import register_model_errors
from kitaru_zenml_pydantic_ai.fallbacks import DurableFallback, with_attempts
from kitaru_zenml_pydantic_ai.messages import message_trees
from kitaru_zenml_pydantic_ai.options import METADATA_KEY, Redact, StepConfig, StepSettings, step_options
from kitaru_zenml_pydantic_ai.outcomes import Outcome
from kitaru_zenml_pydantic_ai.outputs import output_step
from kitaru_zenml_pydantic_ai.steps import name_part
from kitaru_zenml_pydantic_ai.toolsets import durable_leaf

register_model_errors()


class Durability(BaseDurabilityCapability[AgentDepsT]):
    """Makes an agent durable inside a `@flow`; outside a flow the agent is a plain agent.

    Example:
        agent = Agent("openai:gpt-5", name="support", capabilities=[Durability()])
    """

    engine_spec = DurabilityEngineSpec(
        engine_name="Kitaru",
        durable_unit_noun="step",
        durable_container_noun="flow",
        codec=JSON_CODEC,
        toolset_lifecycles={"function": "enter-always", "mcp": "enter-in-durable-unit", "dynamic": "enter-never"},
        tool_config_key=METADATA_KEY,
    )

    def __init__(
        self,
        *,
        models: Mapping[str, Model] | None = None,
        event_stream_handler: EventStreamHandler[AgentDepsT] | None = None,
        name: str | None = None,
        model_steps: StepConfig | None = None,
        tool_steps: StepConfig | None = None,
        tools: Literal["durable", "plain"] = "durable",
        redact: Redact | None = None,
    ) -> None:
        """Say how the agent's steps run.

        Args:
            models: Models by the ids that a run may choose them by.
            event_stream_handler: Gets the events of the agent's runs: a model's deltas live from within the model step, tool events once.
            name: Of the agent's scope; the agent's own name by default.
            model_steps: Step options of model requests, such as `{"retries": 2, "timeout": 120}`. They come on top of the retries of
                the provider's client.
            tool_steps: Step options of tool calls; a tool's `metadata={"kitaru": {...}}` goes before.
            tools: Whether tools are steps (`durable`) or run in the flow (`plain`) if their metadata says nothing.
            redact: Told a step's name and its inputs; returns those that are stored and shown. Outcomes are stored as they are, a
                replay needs them.
        """
        super().__init__(models=models, event_stream_handler=event_stream_handler, name=name)
        step_options(tool_steps, "`tool_steps`")  # say now what is wrong
        self._settings = StepSettings(step_options(model_steps, "`model_steps`"), dict(tool_steps or {}), tools)
        self._redact = redact
        self._live_models: WeakValueDictionary[str, Model] = WeakValueDictionary()  # given to runs, by an id of their own

    # --- what the base asks of an engine ---

    @property
    def in_durable_context(self) -> bool:
        """Whether the code is inside a flow's run."""
        return adapters.in_run()

    def get_durable_operation_backend(self) -> StepBackend:
        """What runs the operations."""
        return StepBackend(agent_name=self.name, config=self._settings, redact=self._redact)

    def get_ordering(self) -> CapabilityOrdering:
        """Innermost, but outside `RequestInput`: the waiter must know the calls that it is about to ask about."""
        return CapabilityOrdering(position="innermost", wrapped_by=(ModelFallback,), wraps=(RequestInput,))

    def _bind_to_agent(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        self._live_models = WeakValueDictionary()

    def _bind_models(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        try:
            super()._bind_models(agent)
        except UserError:
            if agent.model is not None:
                raise
            self._models_by_id = dict(self._extra_models)  # the model is given at run time, which is fine in one process

    def _find_model_id(self, model: Model) -> str | None:
        try:
            return super()._find_model_id(model)
        except UserError:  # given at run time: steps run in this process, so the instance itself serves
            model_id = f"live:{id(model)}"
            self._live_models[model_id] = model
            return model_id

    async def _resolve_model_for_request(self, model_id: str | None, run_context: RunContext[AgentDepsT]) -> Model:
        live = self._live_models.get(model_id) if model_id is not None else None
        if live is not None:
            return with_attempts(live)
        return with_attempts(await super()._resolve_model_for_request(model_id, run_context))

    def _registered_model_id(self, model: Model) -> tuple[bool, str | None]:
        if isinstance(model, DurableFallback):
            return True, None  # whoever made the model it copies opens and closes its clients
        for model_id, live in self._live_models.items():
            if live is model:
                return True, model_id
        return super()._registered_model_id(model)

    # --- ids and time ---

    def get_default_run_id(self) -> str | None:
        """The same on a replay: derived from where the agent is run."""
        return adapters.derived_id(self._scope_name) if self.in_durable_context else None

    def get_default_conversation_id(self, run_id: str) -> str | None:
        """The same on a replay."""
        return conversation_id_from_run_id(run_id) if self.in_durable_context else None

    async def get_run_start_time(self, run_id: str) -> datetime | None:
        """When the agent run first began, recorded: its `timeout` counts from then."""
        if not self.in_durable_context:
            return None
        started: datetime = await run_step(Step(f"{self._scope_name}.start"), _now)
        return started

    # --- an agent run is a scope ---

    async def wrap_run(self, ctx: RunContext[AgentDepsT], *, handler: WrapRunHandler) -> AgentRunResult[Any]:
        """Open the scope of an agent run, resolved by what the run is about."""
        if not self.in_durable_context:
            return await handler()
        about: dict[str, Any] = {"prompt": ctx.prompt, "history": message_trees(ctx.messages)}
        async with adapters.scope(self._scope_name, about, kind="agent"):
            turn.set(Turn())
            waiter = RuntimeWaiter(self._scope_name)
            with _outside_a_unit(), replay_scope(), Agent.using_sleep(_durable_sleep), external_event_scope(waiter):
                return await super().wrap_run(ctx, handler=handler)

    @property
    def _scope_name(self) -> str:
        return name_part(self.name)

    # --- tools ---

    def _register_toolsets(self, agent: AbstractAgent[AgentDepsT, Any]) -> None:
        """Leaves are wrapped when a run meets them, whenever they were added, so nothing is to be registered."""

    def get_wrapper_toolset(self, toolset: Any) -> Any:
        """Put durable leaves in the place of those that run something."""
        if not self.in_durable_context:
            return None
        return toolset.visit_and_replace(partial(durable_leaf, self))

    def _typed_result_codec(self, result_type: object) -> _TypedResultCodec[Any]:
        if result_type is CallToolResult:  # the runtime's own codec keeps what a tool returned as the object that it was
            return _TypedResultCodec(lambda payload: payload, lambda outcome: outcome)
        return super()._typed_result_codec(result_type)

    def _unwrap_tool_result(self, payload: Any) -> Any:
        assert isinstance(payload, Outcome)
        return payload.get()

    # --- outputs ---

    async def wrap_output_process(
        self, ctx: RunContext[AgentDepsT], *, output_context: OutputContext, output: Any, handler: Any
    ) -> Any:
        """Run output functions and validators as a step."""
        has_code = output_context.has_function or bool(getattr(ctx.agent, "_output_validators", ()))
        if not has_code or ctx.partial_output or not self.in_durable_context:
            return await handler(output)
        return await output_step(ctx, output_context, output, handler)

    # --- people ---

    async def handle_deferred_tool_calls(
        self, ctx: RunContext[AgentDepsT], *, requests: DeferredToolRequests
    ) -> DeferredToolResults | None:
        """Leave the calls to `RequestInput`, if the agent has one, and let the waiter know which they are."""
        pending_requests.set(requests)
        return None


async def _now() -> datetime:
    return datetime.now(UTC)


async def _durable_sleep(seconds: float) -> None:
    await sleep(seconds)


@contextlib.contextmanager
def _outside_a_unit() -> Iterator[None]:
    """An agent inside a tool is not the tool's unit: it has steps and waits of its own, which Pydantic AI refuses inside units."""
    token = _IN_DURABLE_UNIT.set(False)
    try:
        yield
    finally:
        _IN_DURABLE_UNIT.reset(token)
