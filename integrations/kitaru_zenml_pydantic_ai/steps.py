"""Which step an operation of Pydantic AI is: its name for people, its key, and the inputs that identify and show it.

The one module that decides identity. Keys are only names that the framework gives (a tool call's id); a model request is told by what is
asked, within the sequential scope of its agent run. The union of operations grows in minor versions of Pydantic AI: what is not known
here becomes a step named after its class.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, cast

from pydantic_ai.durable_exec import (
    CapabilityOperationId,
    DurableOperationId,
    EventStreamHandlerId,
    ModelCancelSuspendedResponseId,
    ModelCompactMessagesId,
    ModelRequestId,
    ToolsetCallToolId,
    ToolsetGetInstructionsId,
    ToolsetGetToolsId,
    ToolsetValidateToolArgumentsId,
)
from pydantic_ai.messages import AgentStreamEvent, ModelResponse
from pydantic_ai.models import ModelRequestContext
from pydantic_ai.tools import RunContext
from pydantic_core import to_json

from kitaru_zenml.adapters import Step
from kitaru_zenml.options import StepOptions
from kitaru_zenml_pydantic_ai.messages import message_trees, request_inputs

_NOT_IN_A_NAME = re.compile(r"[^A-Za-z0-9_.:\-]+")
_NOT_IN_A_KEY = re.compile(r"[\x00-\x1f\[\]/]")
_NAME_LIMIT, _KEY_LIMIT = 70, 60


def name_part(text: str) -> str:
    """A name as it may stand in a step's name."""
    part = _NOT_IN_A_NAME.sub("-", text)
    return part if len(part) <= _NAME_LIMIT else f"{part[: _NAME_LIMIT - 9]}-{_short_digest(text)}"


def call_key(ctx: RunContext[Any]) -> str | None:
    """The key of a tool call: its id, and whether it is the call after an approval or a retry."""
    if ctx.tool_call_id is None:
        return None
    after = f"{' approved' if ctx.tool_call_approved else ''}{f' retry {ctx.retry}' if ctx.retry else ''}"
    return _key_part(ctx.tool_call_id) + after


def _key_part(call_id: str) -> str:
    key = _NOT_IN_A_KEY.sub("-", call_id)
    if len(key) > _KEY_LIMIT or key != call_id:
        key = f"{key[: _KEY_LIMIT - 9]}-{_short_digest(call_id)}"
    return key


def _short_digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def step_of(operation: DurableOperationId, about: tuple[object, ...], name: str, options: StepOptions) -> Step:
    """The step of an operation.

    Args:
        operation: What Pydantic AI does.
        about: What its cache identity names: the parameters that matter.
        name: The name that Pydantic AI's naming policy gives it, for operations that are not known here.
        options: Retries and the like.
    """
    match operation, about:
        case ModelRequestId(), (_, messages, settings, parameters, RunContext()):
            model = model_name(operation.model_id, operation.model_name)
            asked = request_inputs(model, cast(Any, messages), cast(Any, settings), cast(Any, parameters))
            # Which model answers does not tell requests apart: finished answers stay when a run goes on, or forks, with another model.
            return Step("model", asked, kind="model", volatile=("model",), options=options)
        case ToolsetCallToolId(), (str() as tool, arguments, RunContext() as ctx, *_):
            return _tool_step("tool", ctx, tool, arguments, options)
        case ToolsetValidateToolArgumentsId(), (str() as tool, arguments, RunContext() as ctx, *_):
            return _tool_step("validate", ctx, tool, arguments, options)
        case ToolsetGetToolsId(), (RunContext() as ctx,):
            return _discovery("tools", operation.toolset_id, ctx, options)
        case ToolsetGetInstructionsId(), (RunContext() as ctx,):
            return _discovery("instructions", operation.toolset_id, ctx, options)
        case EventStreamHandlerId(), (event,):
            return _event_step(cast(AgentStreamEvent, event), options)
        case ModelCompactMessagesId(), (_, ModelRequestContext() as request, instructions, *_):
            inputs = {"messages": message_trees(request.messages), "model": operation.model_name, "instructions": instructions}
            return Step("compact", inputs, kind="model", options=options)
        case ModelCancelSuspendedResponseId(), (_, ModelResponse() as response, *_):
            inputs = {"response": message_trees([response])[0], "model": operation.model_name}
            return Step("cancel_response", inputs, options=options)
        case CapabilityOperationId(), _:
            short = name_part(f"{operation.capability_id}.{operation.operation}")
            return Step(short, _plain_inputs(about), options=options)
        case _:
            return Step(name_part(name), _plain_inputs(about), options=options)


def model_name(model_id: str | None, name: str) -> str:
    """A model as people call it: the id that it was chosen by, else its name."""
    return model_id if model_id is not None and not model_id.startswith("live:") else name


def _tool_step(what: str, ctx: RunContext[Any], tool: str, arguments: Any, options: StepOptions) -> Step:
    inputs = dict(arguments) if isinstance(arguments, Mapping) else {"arguments": arguments}
    kind = "tool" if what == "tool" else "step"
    return Step(f"{what}:{name_part(ctx.tool_name or tool)}", inputs, call_key(ctx), kind, options=options)


def _discovery(what: str, toolset_id: str | None, ctx: RunContext[Any], options: StepOptions) -> Step:
    name = f"{what}:{name_part(toolset_id)}" if toolset_id else what
    return Step(name, {"turn": ctx.run_step}, options=options)


def _event_step(event: AgentStreamEvent, options: StepOptions) -> Step:
    """Parallel tools end in any order, so an event is told by the call that it is about, else by its content; never by its place."""
    kind = getattr(event, "event_kind", type(event).__name__)
    about = getattr(event, "part", None) or getattr(event, "result", None)
    found = {"tool_call_id": getattr(about, "tool_call_id", None), "tool": getattr(about, "tool_name", None)}
    inputs = {name: value for name, value in found.items() if value}
    key = _key_part(inputs["tool_call_id"]) if "tool_call_id" in inputs else _short_digest(_timeless(event))
    return Step(f"event:{name_part(kind)}", inputs, key, kind="delivery", options=options)


def _timeless(event: AgentStreamEvent) -> str:
    return re.sub(r'"(timestamp|run_id)":"[^"]*"', "", to_json(event, fallback=repr).decode())


def _plain_inputs(about: tuple[object, ...]) -> dict[str, Any]:
    """Parameters of an operation that is not known here, without what cannot identify it: contexts, models, times."""
    inputs: dict[str, Any] = {}
    for number, part in enumerate(about):
        if isinstance(part, RunContext) or part is None:
            continue
        if is_dataclass(part) and not isinstance(part, type):
            inputs |= {f.name: getattr(part, f.name) for f in fields(part) if not isinstance(getattr(part, f.name), RunContext)}
        else:
            inputs[f"argument_{number}"] = part
    return inputs
