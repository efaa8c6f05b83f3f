"""What a user can say about steps: defaults of an agent, and per tool through the tool's metadata.

`@agent.tool(metadata={"kitaru": {"retries": 2, "timeout": 30}})` gives a tool's steps options of their own, `metadata={"kitaru": False}`
makes it plain: it runs in the flow, without a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic_ai.durable_exec import DurableOperationId, RoleBasedOperationConfig, ToolsetValidateToolArgumentsId
from pydantic_ai.exceptions import UserError
from pydantic_ai.toolsets import ToolsetTool

from kitaru_zenml.options import StepOptions

METADATA_KEY = "kitaru"
StepConfig = Mapping[str, Any]
"""Options of steps by name: `retries`, `retry_delay`, `retry_backoff`, `retry_max_delay`, `retry_on`, `timeout`, `at_most_once`,
`ignore`, `on_drift`, as `@checkpoint` takes them."""

Redact = Callable[[str, dict[str, Any]], dict[str, Any]]
"""Told a step's name and its inputs; returns the inputs that are stored and shown."""

_ALLOWED = {f.name for f in fields(StepOptions)} - {"isolated", "resources", "step_operator", "metadata"}


def step_options(config: StepConfig | None, whose: str) -> StepOptions:
    """The options that a user wrote.

    Raises:
        UserError: If there is no such option, or a value is wrong.
    """
    given = dict(config or {})
    if unknown := sorted(given.keys() - _ALLOWED):
        raise UserError(f"{whose} has no step option `{unknown[0]}`. The options are {', '.join(sorted(_ALLOWED))}.")
    if isinstance(given.get("retry_on"), type):
        given["retry_on"] = (given["retry_on"],)
    if isinstance(given.get("ignore"), str):
        given["ignore"] = (given["ignore"],)
    try:
        return StepOptions(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"{whose} has a wrong step option: {error}") from error


class StepSettings(RoleBasedOperationConfig[StepOptions]):
    """Which options a step gets."""

    def __init__(self, model: StepOptions, tool: StepConfig, tools: Literal["durable", "plain"]) -> None:
        self._tool, self._tools = tool, tools
        super().__init__(
            model=model, event=StepOptions(), capability=StepOptions(), tool=StepOptions(), resolve_tool=self._of_tool
        )

    def _of_tool(self, operation_id: DurableOperationId, tool: object | None, tool_name: str) -> StepOptions | Literal[False]:
        own: Any = None
        if isinstance(tool, ToolsetTool):
            own = (tool.tool_def.metadata or {}).get(METADATA_KEY)
        if tool_name and (own is False or (own is None and self._tools == "plain")):
            return False
        if own is not None and not isinstance(own, Mapping) and own is not True:
            raise UserError(
                f"The metadata `{METADATA_KEY}` of tool `{tool_name}` is step options or False, not {type(own).__name__}."
            )
        merged = {**self._tool, **(own if isinstance(own, Mapping) else {})}
        if isinstance(operation_id, ToolsetValidateToolArgumentsId):
            merged.pop("at_most_once", None)  # validation has no effects to protect
        return step_options(merged, f"Tool `{tool_name}`" if tool_name else "The agent's tools")
