"""Questions to people: each tool call that needs an approval, an answer or an outside result is a wait of the run.

`RequestInput` asks for all pending calls of a turn at once. Its `ask` is called once, as a step, and may answer by itself or tell somebody;
else each call becomes a wait of its own, open together, answered in any order by `kitaru answer`, the client or ZenML's dashboard, while no
process is held. A wait is told by the call and its arguments: an answer is consumed by that call alone, and never by changed arguments.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue, TypeAdapter
from pydantic_ai.durable_exec import ExternalEventError, ExternalEventWaiter
from pydantic_ai.exceptions import ToolFailed, UserError
from pydantic_ai.messages import ToolCallPart
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, ToolApproved, ToolDenied
from pydantic_core import to_jsonable_python

from kitaru_zenml import adapters
from kitaru_zenml.adapters import Step, run_step
from kitaru_zenml.errors import WaitTimedOut
from kitaru_zenml_pydantic_ai.steps import name_part

pending_requests: ContextVar[DeferredToolRequests | None] = ContextVar("kitaru_pydantic_ai_pending", default=None)
"""The calls that are about to be asked about, in the task that handles them."""

_RESULTS: TypeAdapter[DeferredToolResults] = TypeAdapter(DeferredToolResults)


class Decision(BaseModel):
    """An answer about a tool call; a plain `true` or `false` does as well.

    Attributes:
        approve: Whether the tool may run.
        message: What the model is told if not.
        arguments: Arguments to run it with in place of the model's.
    """

    model_config = ConfigDict(extra="forbid")

    approve: bool
    message: str | None = None
    arguments: dict[str, Any] | None = None


class RuntimeWaiter(ExternalEventWaiter):
    """Pydantic AI's waits as waits of the runtime. Stateless: one for each agent run."""

    def __init__(self, agent: str) -> None:
        self._agent = agent

    async def wait(self, name: str, *, ask: Callable[[str], Awaitable[JsonValue]], timeout: timedelta | None) -> JsonValue:
        """Ask once, as a step, then wait for the answers; see the base.

        Raises:
            ExternalEventError: If a wait that is not about tool calls has had its time.
        """
        requests = pending_requests.get()
        pending_requests.set(None)
        about = _about(requests) if requests is not None else []
        token = adapters.derived_id(f"ask:{name}")
        answer = await run_step(
            Step(f"ask:{name_part(name)}", {"calls": about, "token": token}, volatile=("token",)), lambda: ask(token)
        )
        if answer is not None:
            return answer  # type: ignore[no-any-return]
        if requests is None:
            return await self._for_anything(name, timeout)
        results = await _answers(requests, timeout)
        return _RESULTS.dump_python(results, mode="json")  # type: ignore[no-any-return]

    async def _for_anything(self, name: str, timeout: timedelta | None) -> JsonValue:
        try:
            return await adapters.wait(name_part(name), schema=Any, timeout=timeout)  # type: ignore[no-any-return]
        except WaitTimedOut as expired:
            raise ExternalEventError(str(expired)) from None


async def _answers(requests: DeferredToolRequests, timeout: timedelta | None) -> DeferredToolResults:
    calls = [*requests.approvals, *requests.calls]
    ids = [call.tool_call_id for call in calls]
    if len(set(ids)) != len(ids):
        raise UserError(
            f"The model gave the same id to several pending tool calls: {ids}. No answer can be told to belong to one."
        )
    approving = [_approval(call, requests.metadata.get(call.tool_call_id), timeout) for call in requests.approvals]
    getting = [
        _result(call, requests.kind(call.tool_call_id), requests.metadata.get(call.tool_call_id), timeout)
        for call in requests.calls
    ]
    answers = await asyncio.gather(*approving, *getting)
    given = dict(zip(ids, answers, strict=True))
    return requests.build_results(
        approvals={call.tool_call_id: given[call.tool_call_id] for call in requests.approvals},
        calls={call.tool_call_id: given[call.tool_call_id] for call in requests.calls},
    )


async def _approval(call: ToolCallPart, metadata: Any, timeout: timedelta | None) -> ToolApproved | ToolDenied:
    question = f"May the agent call {call.tool_name}({call.args_as_json_str()})?"
    try:
        answer = await adapters.wait(
            f"approve:{name_part(call.tool_name)}", schema=bool | Decision, question=question, timeout=timeout,
            metadata=_facts(call, metadata),
        )  # fmt: skip
    except WaitTimedOut as expired:
        return ToolDenied(f"No decision on this tool call arrived: {expired}")
    decision = answer if isinstance(answer, Decision) else Decision(approve=bool(answer))
    if decision.approve:
        return ToolApproved(override_args=decision.arguments)
    return ToolDenied(decision.message) if decision.message else ToolDenied()


async def _result(call: ToolCallPart, kind: str, metadata: Any, timeout: timedelta | None) -> Any:
    question = (
        f"{'The agent asks' if kind == 'question' else 'What is the result of'} {call.tool_name}({call.args_as_json_str()})"
    )
    try:
        return await adapters.wait(
            f"{'question' if kind == 'question' else 'result'}:{name_part(call.tool_name)}", schema=Any, question=question,
            timeout=timeout, metadata=_facts(call, metadata),
        )  # fmt: skip
    except WaitTimedOut as expired:
        return ToolFailed(f"No result of this tool call arrived: {expired}")


def _facts(call: ToolCallPart, metadata: Any) -> dict[str, Any]:
    arguments = _arguments(call)
    text = json.dumps(arguments, sort_keys=True, ensure_ascii=False)
    facts = {
        "tool": call.tool_name,
        "arguments": arguments,
        "tool_call_id": call.tool_call_id,
        "arguments_digest": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16],
    }
    return facts if not metadata else {**facts, "metadata": to_jsonable_python(metadata, fallback=repr)}


def _arguments(call: ToolCallPart) -> Any:
    try:
        return call.args_as_dict()
    except ValueError:  # not JSON: shown as the model wrote it
        return call.args


def _about(requests: DeferredToolRequests) -> list[dict[str, Any]]:
    return [
        {"tool": call.tool_name, "tool_call_id": call.tool_call_id, "arguments": _arguments(call)}
        for call in (*requests.approvals, *requests.calls)
    ]
