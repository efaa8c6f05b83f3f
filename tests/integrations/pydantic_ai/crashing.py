"""Runs a flow whole, then with a crash after each of its records, and holds what comes to the whole run.

Bodies of models and tools call `mark()`; a body whose record stood at the crash must not run again. Legs are in process, over a store in
memory; what SIGKILL does is in `test_sweep`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter, ModelResponse, TextPart, ToolCallPart
from pydantic_ai.models.function import AgentInfo, FunctionModel

from kitaru_zenml.adapters import current_step, in_run
from kitaru_zenml.execution import Execution
from kitaru_zenml.journal.records import StepRecord, unseal
from tests.simulation import Crash, MemoryStore, run_leg

ran: list[str] = []  # paths of the steps whose bodies ran


def mark(what: str = "") -> None:
    """A body of a step runs."""
    ran.append(current_step().path if in_run() else what)


Turn = str | list[tuple[str, str, dict[str, Any]]] | ModelResponse | Exception


def scripted(*turns: Turn | Callable[[list[ModelMessage]], Turn], name: str = "scripted") -> FunctionModel:
    """A model that says the n-th turn after n responses: a text, tool calls (tool, id, arguments), a response or an error."""

    def answer(messages: list[ModelMessage], info: AgentInfo) -> ModelResponse:
        mark("model")
        turn: Any = turns[min(sum(isinstance(m, ModelResponse) for m in messages), len(turns) - 1)]
        turn = turn(messages) if callable(turn) else turn
        if isinstance(turn, Exception):
            raise turn
        if isinstance(turn, ModelResponse):
            return turn
        if isinstance(turn, str):
            return ModelResponse(parts=[TextPart(turn)])
        return ModelResponse(parts=[ToolCallPart(tool, arguments, call_id) for tool, call_id, arguments in turn])

    return FunctionModel(answer, model_name=name)


def returned(messages: list[ModelMessage]) -> str:
    """What the tools said last, for a final answer."""
    return "got " + ", ".join(str(getattr(p, "content", "")) for p in messages[-1].parts)


def story(result: Any) -> dict[str, Any]:
    """Output, usage and history of a run, but for times."""
    messages = ModelMessagesTypeAdapter.dump_python(result.all_messages(), mode="json")
    usage = {name: value for name, value in vars(result.usage).items() if value}
    return {"output": result.output, "usage": usage, "messages": without_times(messages)}


def without_times(tree: Any) -> Any:
    """A tree without its times."""
    if isinstance(tree, dict):
        return {k: without_times(v) for k, v in tree.items() if k not in ("timestamp", "duration")}
    return [without_times(item) for item in tree] if isinstance(tree, list) else tree


def whole(flow: Callable[..., Any], **options: Any) -> tuple[Any, dict[str, StepRecord], Execution]:
    """Run a flow without a crash; its value, its records by path, and the leg."""
    ran.clear()
    objects: dict[str, bytes] = {}
    ended, execution = run_leg(MemoryStore(objects), flow, **options)
    if ended.error is not None:
        raise ended.error
    return ended.value, records(objects), execution


def records(objects: dict[str, bytes]) -> dict[str, StepRecord]:
    """The records of a store, by path."""
    found = [unseal(StepRecord, data, name) for name, data in objects.items() if "/steps/" in name]
    return {record.path: record for record in found}


def survives(flow: Callable[..., Any], *, at: Iterable[int] | None = None, **options: Any) -> tuple[Any, dict[str, StepRecord]]:
    """Crash a flow after each of its records, resume it, and check that the end is the whole run's and nothing finished ran again."""
    value, found, _ = whole(flow, **options)
    paths = Counter(ran)
    for crash_after in at if at is not None else range(len(found)):
        objects: dict[str, bytes] = {}
        ran.clear()
        try:
            run_leg(MemoryStore(objects, crash_after=crash_after, seed=crash_after), flow, **options)
        except Crash:
            pass
        stood = {path for path, record in records(objects).items() if record.failure is None}
        first = Counter(ran)
        ran.clear()
        ended, _ = run_leg(MemoryStore(objects), flow, **options)
        if ended.error is not None:
            raise ended.error
        assert ended.value == value, f"after a crash at record {crash_after}"
        again = [path for path in ran if path in stood]
        assert not again, f"finished steps ran again after a crash at record {crash_after}: {again}"
        assert set(first) | set(ran) == set(paths), f"other steps after a crash at record {crash_after}"
    return value, found
