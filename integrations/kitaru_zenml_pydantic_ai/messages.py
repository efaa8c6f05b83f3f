"""What a model is asked, as the inputs that identify and show a model step: the same on a replay, and told in little space.

Pydantic AI stamps each request with the time and with ids of the run, anew on a replay: none of it is part of what is asked. A response
keeps what is sent back to the model (its parts), not what it cost. A grown history keeps the trees of its beginning, so that the runtime
stores a chat of n turns in O(n) bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse
from pydantic_ai.models import ModelRequestParameters
from pydantic_ai.settings import ModelSettings
from pydantic_ai.tools import ToolDefinition
from pydantic_core import PydanticSerializationError, to_jsonable_python

_OF_A_MESSAGE = {"kind", "parts", "instructions", "model_name"}
_NEVER = {"timestamp", "run_id", "conversation_id"}


def message_trees(messages: Sequence[ModelMessage]) -> list[dict[str, Any]]:
    """Messages as they identify a request."""
    try:
        dumped = ModelMessagesTypeAdapter.dump_python(list(messages), mode="json")
    except PydanticSerializationError:  # a tool returned what has no JSON form; the runtime names it by its type
        dumped = [_fields_of(message) for message in messages]
    return [_message_tree(message) for message in dumped]


def _fields_of(message: ModelMessage) -> dict[str, Any]:
    found = {f.name: getattr(message, f.name) for f in fields(message)}
    return {**found, "parts": [{f.name: getattr(part, f.name) for f in fields(part)} for part in message.parts]}


def _message_tree(dumped: Mapping[str, Any]) -> dict[str, Any]:
    tree = {name: value for name, value in dumped.items() if name in _OF_A_MESSAGE and value is not None}
    return {**tree, "parts": [_without_empty(part) for part in dumped["parts"]]}


def _without_empty(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if value is not None and name not in _NEVER}


def request_inputs(
    model: str, messages: Sequence[ModelMessage], settings: ModelSettings | None, parameters: ModelRequestParameters
) -> dict[str, Any]:
    """The inputs of a model step."""
    inputs: dict[str, Any] = {"messages": message_trees(messages), "model": model}
    if tools := [_tool_tree(tool) for tool in parameters.function_tools]:
        inputs["tools"] = tools
    if parameters.native_tools:
        inputs["native_tools"] = [to_jsonable_python(tool, fallback=repr) for tool in parameters.native_tools]
    output: dict[str, Any] = {}
    if parameters.output_mode != "text":
        output["mode"] = parameters.output_mode
    if parameters.output_tools:
        output["tools"] = [_tool_tree(tool) for tool in parameters.output_tools]
    if parameters.output_object is not None:
        output["object"] = to_jsonable_python(parameters.output_object, fallback=repr)
    if output:
        inputs["output"] = output
    if settings:
        inputs["settings"] = dict(settings)
    return inputs


def _tool_tree(tool: ToolDefinition) -> dict[str, Any]:
    return _without_empty(
        {"name": tool.name, "description": tool.description, "parameters": tool.parameters_json_schema, "strict": tool.strict}
    )


def compact_response(dumped: dict[str, Any]) -> dict[str, Any]:
    """A dumped `ModelResponse` without what is empty, which loading fills in again."""
    tree = {name: value for name, value in dumped.items() if value not in (None, [], {})}
    tree["parts"] = [{name: value for name, value in part.items() if value is not None} for part in dumped["parts"]]
    if usage := dumped.get("usage"):
        tree["usage"] = {name: value for name, value in usage.items() if value not in (0, None, {}, [])}
    return tree


def response_of(given: Any) -> Any:
    """The dumped `ModelResponse` of what was recorded, or of what a person gave in its place: a text, a tool call, or the whole."""
    if isinstance(given, str):
        return {"kind": "response", "parts": [{"part_kind": "text", "content": given}]}
    if isinstance(given, dict) and "parts" not in given and "tool_name" in given:
        call = {"part_kind": "tool-call", "args": {}, **given}
        call.setdefault("tool_call_id", f"override-{given['tool_name']}")
        return {"kind": "response", "parts": [call]}
    if isinstance(given, dict) and "parts" in given:
        return {"kind": "response", **given}
    return given


def facts(response: ModelResponse) -> dict[str, Any]:
    """What a person wants to know of a response beside its content."""
    found = {
        "model": response.model_name,
        "provider": response.provider_name,
        "finish_reason": response.finish_reason,
        "provider_response_id": response.provider_response_id,
        "tool_calls": [part.tool_name for part in response.tool_calls],
    }
    return {name: value for name, value in found.items() if value}


def cost_of(response: ModelResponse) -> float | None:
    """US dollars, if the price of the model is known."""
    try:
        return float(response.cost().total_price)
    except Exception:  # no price for this model or provider, or no model name
        return None
