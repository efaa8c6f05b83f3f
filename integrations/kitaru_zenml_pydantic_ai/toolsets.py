"""Which toolsets are made durable, and when: every leaf that runs something, as a run meets it, also one of a class of the user's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from pydantic_ai.durable_exec import DurableOperation, ToolsetCallToolId, ToolsetCallToolParams
from pydantic_ai.durable_exec._base import _FunctionCallToolCacheIdentity
from pydantic_ai.durable_exec._toolset import CallToolResult, DurableFunctionToolset, DurableToolsetBase, wrap_tool_call_result
from pydantic_ai.toolsets import AbstractToolset, ToolsetTool, WrapperToolset

if TYPE_CHECKING:
    from kitaru_zenml_pydantic_ai.capability import Durability


def durable_leaf(durability: Durability[Any], leaf: AbstractToolset[Any]) -> AbstractToolset[Any]:
    """What to use in a run instead of a leaf: itself if it runs nothing, or is durable already."""
    if isinstance(leaf, DurableToolsetBase):
        return leaf
    made = durability._wrap_leaf_toolset(leaf)
    if made is None and _runs_code_of_users(leaf):
        made = _of_other_class(durability, leaf)
    return leaf if made is None else made


def _of_other_class(durability: Durability[Any], leaf: AbstractToolset[Any]) -> WrapperToolset[Any]:
    """A leaf of a class that Pydantic AI does not know: its listing runs in the flow, each of its calls is a step."""
    backend = durability.get_durable_operation_backend()

    async def handler(params: ToolsetCallToolParams) -> CallToolResult:
        assert params.tool is not None
        with durability._tool_run_context_scope(params.ctx) as ctx:
            return await wrap_tool_call_result(leaf.call_tool(params.name, params.tool_args, ctx, params.tool))

    call = backend.bind(
        DurableOperation(
            operation_id=ToolsetCallToolId("function", toolset_id=leaf.id or type(leaf).__name__),
            handler=handler,
            parameter_transport=backend.parameter_transports.mcp_call(leaf),
            cache_identity=_FunctionCallToolCacheIdentity(),
            result_codec=durability._typed_result_codec(CallToolResult),
            config_role="tool",
            invocation_label=lambda params: params.name,
        )
    )

    def config_of(tool: ToolsetTool[Any] | None, name: str) -> Any:
        return backend.config_for_tool(call.operation, tool=tool, tool_name=name)

    async def call_tool(name: str, tool_args: dict[str, Any], *, ctx: Any, tool: ToolsetTool[Any], config: Any) -> Any:
        payload = await call(ToolsetCallToolParams(name, tool_args=tool_args, ctx=ctx, tool=tool), config=config)
        return durability._unwrap_tool_result(payload)

    return DurableFunctionToolset(
        cast(Any, leaf),
        in_durable_context=lambda: durability.in_durable_context,
        call_tool_operation=call_tool,
        resolve_tool_config=config_of,
        lifecycle="enter-always",
    )


def _runs_code_of_users(leaf: AbstractToolset[Any]) -> bool:
    return not type(leaf).__module__.startswith("pydantic_ai.")
