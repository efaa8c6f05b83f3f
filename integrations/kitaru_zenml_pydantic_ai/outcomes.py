"""Outcomes of tool steps: what a tool returned stands as it is, so that a person reads it and may override it with a plain value.

Anything else is told in an envelope, `{"pydantic_ai": {...}}`:

    {"signal": ...}                  control flow as a value: a retry, an approval that is needed, a failure told to the model
    {"result": ..., "usage": ...}    a result with what agents inside the tool consumed
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic_ai.durable_exec import JSON_CODEC, CallToolResult
from pydantic_ai.durable_exec._toolset import unwrap_tool_call_result
from pydantic_ai.exceptions import ModelRetry, ToolRetryError
from pydantic_ai.messages import RetryFeedbackPart, ToolReturnPart
from pydantic_ai.usage import RunUsage

from kitaru_zenml.errors import KitaruError

_ENVELOPE = "pydantic_ai"
_RETRY: TypeAdapter[RetryFeedbackPart | ToolReturnPart] = TypeAdapter(
    Annotated[RetryFeedbackPart | ToolReturnPart, Field(discriminator="part_kind")]
)


class UnreadableOutcome(KitaruError):
    """A recorded outcome that this version of Pydantic AI cannot read."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(
            f"The recorded outcome of {what} cannot be read by this version of Pydantic AI: {reason}. Resume the run with the version "
            "that recorded it, or give its value in a fork: `kitaru replay RUN --override STEP=VALUE`."
        )


class Outcome:
    """A decoded outcome of a tool, on its way to the agent."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        """The tool's result, or raise what it raised."""
        inside = _opened(self._value)
        if inside is None:
            return self._value
        if "signal" in inside:
            _raise_signal(inside["signal"])
        if "retry" in inside:
            raise ToolRetryError(_RETRY.validate_python(inside["retry"]))
        return inside["result"]

    @property
    def usage(self) -> RunUsage | None:
        """What agents inside the tool consumed."""
        inside = _opened(self._value)
        if inside is None or "usage" not in inside:
            return None
        return _load_usage(inside["usage"])


def tool_outcome(payload: Any, spent: RunUsage) -> Any:
    """The outcome to record for what a tool operation came to."""
    usage = _dump_usage(spent)
    try:
        result = unwrap_tool_call_result(payload)
    except Exception:  # control flow, as Pydantic AI puts it in a value
        return {_ENVELOPE: {"signal": JSON_CODEC.dump(CallToolResult, payload), **usage}}
    return result_outcome(result, spent)


def result_outcome(result: Any, spent: RunUsage) -> Any:
    """The outcome to record for a result."""
    usage = _dump_usage(spent)
    if usage or _opened(result) is not None:
        return {_ENVELOPE: {"result": result, **usage}}
    return result


def retry_outcome(error: ToolRetryError | ModelRetry, spent: RunUsage) -> Any:
    """The outcome to record for an output that the model must give again."""
    if isinstance(error, ModelRetry):
        told: dict[str, Any] = {"signal": {"kind": "model_retry", "message": error.message}}
    else:
        told = {"retry": _RETRY.dump_python(error.tool_retry, mode="json")}
    return {_ENVELOPE: {**told, **_dump_usage(spent)}}


def _opened(value: Any) -> dict[str, Any] | None:
    if type(value) is dict and value.keys() == {_ENVELOPE} and isinstance(value[_ENVELOPE], dict):
        inside: dict[str, Any] = value[_ENVELOPE]
        return inside
    return None


def _raise_signal(signal: Any) -> None:
    try:
        loaded = JSON_CODEC.load(CallToolResult, signal)
    except ValidationError as error:
        # Were it raised as it is, Pydantic AI would take it for wrong arguments of the model, and call the tool again.
        raise UnreadableOutcome("a tool call", str(error)) from None
    unwrap_tool_call_result(loaded)


def _dump_usage(spent: RunUsage) -> dict[str, Any]:
    if not spent.has_values():
        return {}
    return {"usage": {name: value for name, value in vars(spent).items() if value}}


def _load_usage(tree: dict[str, Any]) -> RunUsage:
    usage = RunUsage()
    for name, value in tree.items():  # providers count more than the declared fields
        setattr(usage, name, value)
    return usage
