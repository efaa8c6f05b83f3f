"""What agents do, each scenario whole and with a crash after each of its records: the end is the same, nothing finished runs again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ModelRetry, RunContext, ToolOutput, ToolReturn
from pydantic_ai.capabilities import Hooks, ModelFallback
from pydantic_ai.exceptions import ModelHTTPError, ToolFailed, UnexpectedModelBehavior, UsageLimitExceeded, UserError
from pydantic_ai.messages import BinaryContent, ModelResponse, TextPart, ThinkingPart, ToolCallPart, UserPromptPart
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.output import NativeOutput, PromptedOutput, TextOutput
from pydantic_ai.toolsets import AbstractToolset, FunctionToolset, ToolsetTool
from pydantic_ai.usage import UsageLimits

from kitaru_zenml.adapters import current_step
from kitaru_zenml.checkpoints import checkpoint
from kitaru_zenml.errors import NotInRun
from kitaru_zenml_pydantic_ai import Durability
from tests.integrations.pydantic_ai.crashing import mark, ran, records, returned, scripted, story, survives, whole
from tests.simulation import Crash, MemoryStore, run_leg


def agent_of(*turns: Any, **options: Any) -> Agent[Any, Any]:
    capabilities = [*options.pop("capabilities", []), options.pop("durability", None) or Durability()]
    return Agent(scripted(*turns), name=options.pop("name", "support"), capabilities=capabilities, **options)


def flow_of(agent: Agent[Any, Any], prompt: Any = "go", **options: Any) -> Any:
    async def flow() -> dict[str, Any]:
        return story(await agent.run(prompt, **options))

    return flow


def displays(found: dict[str, Any]) -> list[str]:
    return [r.display for r in sorted(found.values(), key=lambda r: r.number) if r.path != "/"]


# --- steps ---------------------------------------------------------------------------------------------------------------


def test_a_plain_answer_is_one_model_step() -> None:
    value, found = survives(flow_of(agent_of("hello")))
    assert value["output"] == "hello" and displays(found) == ["support#0/model#0"]
    [record] = [r for r in found.values() if r.kind == "model"]
    assert record.usage and record.usage.model == "scripted" and record.usage.input_tokens
    assert record.metadata["model"] == "scripted"


def test_tools_are_steps_named_after_their_calls_and_follow_the_model_step_that_asked() -> None:
    agent = agent_of([("refund", "call_7", {"amount": 5}), ("refund", "call_8", {"amount": 6})], returned)

    @agent.tool_plain
    def refund(amount: int) -> str:
        mark()
        return f"refunded {amount}"

    value, found = survives(flow_of(agent))
    assert value["output"] == "got refunded 5, refunded 6"
    assert displays(found) == [
        "support#0/model#0",
        "support#0/tool:refund[call_7]",
        "support#0/tool:refund[call_8]",
        "support#0/model#1",
    ]
    first, last = (r for r in sorted(found.values(), key=lambda r: r.number) if r.kind == "model")
    tools = [r for r in found.values() if r.kind == "tool"]
    assert all(tool.after == (first.object_key,) for tool in tools)
    assert set(last.after) == {tool.object_key for tool in tools}
    assert tools[0].metadata == {"tool": "refund", "tool_call_id": "call_7"}


def test_parallel_tools_with_awaiting_hooks_keep_their_results() -> None:
    hooks = Hooks()

    @hooks.on.before_tool_execute
    async def slow_for_the_first(ctx: RunContext[Any], *, call: ToolCallPart, tool_def: Any, args: dict[str, Any]) -> Any:
        await asyncio.sleep(0.02 if call.tool_call_id == "a" else 0)
        return args

    agent = agent_of([("look", i, {"x": i}) for i in "abc"], returned, capabilities=[hooks])

    @agent.tool_plain
    async def look(x: str) -> str:
        mark()
        return f"seen {x}"

    value, _ = survives(flow_of(agent))
    assert value["output"] == "got seen a, seen b, seen c"


def test_a_retry_asked_by_a_tool() -> None:
    agent = agent_of([("find", "1", {"q": "bad"})], [("find", "2", {"q": "good"})], returned)

    @agent.tool_plain
    def find(q: str) -> str:
        mark()
        if q == "bad":
            raise ModelRetry("be more precise")
        return "found"

    value, found = survives(flow_of(agent))
    assert value["output"] == "got found"
    [retried] = [r for r in found.values() if r.key == "1"]
    assert retried.failure is None and retried.outcome.data == {
        "pydantic_ai": {"signal": {"kind": "model_retry", "message": "be more precise"}}
    }


def test_a_tool_that_failed_and_says_so() -> None:
    agent = agent_of([("pay", "1", {})], returned)

    @agent.tool_plain
    def pay() -> str:
        mark()
        raise ToolFailed("the bank is closed")

    value, _ = survives(flow_of(agent))
    assert "the bank is closed" in value["output"]


def test_wrong_arguments_go_back_to_the_model() -> None:
    agent = agent_of([("add", "1", {"n": "x"})], [("add", "2", {"n": 2})], returned)

    @agent.tool_plain
    def add(n: int) -> int:
        mark()
        return n + 1

    assert survives(flow_of(agent))[0]["output"] == "got 3"


def test_an_arguments_validator_is_a_step() -> None:
    def below_ten(ctx: RunContext[Any], n: int) -> None:
        mark()
        if n > 10:
            raise ModelRetry("at most 10")

    agent = agent_of([("add", "1", {"n": 12})], [("add", "2", {"n": 2})], returned)

    @agent.tool_plain(args_validator=below_ten)
    def add(n: int) -> int:
        mark()
        return n + 1

    value, found = survives(flow_of(agent))
    assert value["output"] == "got 3"
    assert [d for d in displays(found) if "validate" in d] == ["support#0/validate:add[1]", "support#0/validate:add[2 retry 1]"]


def test_an_exception_of_a_tool_ends_the_run_as_itself_and_is_recorded() -> None:
    agent = agent_of([("look", "1", {})], "never")

    @agent.tool_plain
    def look() -> str:
        mark()
        raise LookupError("gone")

    async def flow() -> str:
        try:
            await agent.run("go")
        except LookupError as error:
            return f"caught {error}"
        return "not raised"

    assert survives(flow)[0] == "caught gone"


def test_a_hook_that_recovers_a_tools_exception_finds_it_again() -> None:
    hooks = Hooks()

    @hooks.on.tool_execute_error
    async def recover(ctx: RunContext[Any], *, call: Any, tool_def: Any, args: Any, error: Exception) -> Any:
        return f"recovered from {type(error).__name__} {error}"

    agent = agent_of([("look", "1", {})], returned, capabilities=[hooks])

    @agent.tool_plain
    def look() -> str:
        mark()
        raise LookupError("gone")

    assert survives(flow_of(agent))[0]["output"] == "got recovered from LookupError gone"


def test_a_repeated_tool_call_id_is_another_call() -> None:
    agent = agent_of([("look", "same", {"x": 1})], [("look", "same", {"x": 2})], returned)

    @agent.tool_plain
    def look(x: int) -> int:
        mark()
        return x * 10

    assert survives(flow_of(agent))[0]["output"] == "got 20"


# --- models --------------------------------------------------------------------------------------------------------------


def test_a_failed_model_before_a_fallback_is_not_asked_again() -> None:
    broken = scripted(ModelHTTPError(503, "first", {"error": "overloaded"}), name="first")
    agent = Agent(
        name="support", capabilities=[ModelFallback(broken, scripted("from the second", name="second")), Durability()]
    )
    value, found = survives(flow_of(agent))
    assert value["output"] == "from the second"
    failed = next(r for r in found.values() if r.failure is not None)
    assert failed.inputs["model"] == "first" and failed.failure.type.endswith("ModelHTTPError")


def test_a_fallback_model_is_asked_once() -> None:
    model = FallbackModel(scripted(ModelHTTPError(500, "a"), name="a"), scripted("from b", name="b"))
    agent = Agent(model, name="support", capabilities=[Durability()])
    value, found = survives(flow_of(agent))
    assert value["output"] == "from b"
    attempts = ["support#0/model#0/attempt:a#0", "support#0/model#0/attempt:b#0"]
    assert [d for d in displays(found) if "attempt" in d] == attempts


def test_http_errors_with_a_category_are_rebuilt_as_they_were() -> None:
    agent = agent_of(_rate_limited())

    async def flow() -> list[Any]:
        try:
            await agent.run("go")
        except ModelHTTPError as error:
            return [type(error).__name__, error.status_code, error.model_name, error.body]
        return []

    value, _ = survives(flow)
    assert value[1:] == [429, "m", {"error": "slow down"}]


def _rate_limited() -> Exception:
    from pydantic_ai.exceptions import ModelRateLimitError, _categorized_http_error

    return _categorized_http_error(ModelRateLimitError, 429, "m", {"error": "slow down"})


def test_a_model_given_at_run_time_needs_no_registration() -> None:
    agent = Agent(name="support", capabilities=[Durability()])
    assert survives(flow_of(agent, model=scripted("from the run's model")))[0]["output"] == "from the run's model"


def test_a_registered_model_is_chosen_by_its_id() -> None:
    durability = Durability(models={"fast": scripted("fast one", name="f")})
    agent = agent_of("slow one", durability=durability)
    value, found = survives(flow_of(agent, model="fast"))
    assert value["output"] == "fast one"
    assert next(r for r in found.values() if r.kind == "model").inputs["model"] == "fast"


def test_thinking_parts_and_their_signatures_come_back() -> None:
    thought = ModelResponse(parts=[ThinkingPart("hm", signature="sig"), ToolCallPart("look", {}, "1")])
    agent = agent_of(thought, returned)

    @agent.tool_plain
    def look() -> str:
        mark()
        return "seen"

    value, _ = survives(flow_of(agent))
    assert value["messages"][1]["parts"][0]["signature"] == "sig"


def test_model_settings_and_dynamic_instructions_are_part_of_what_is_asked() -> None:
    agent = agent_of("ok", model_settings={"temperature": 0.5})

    @agent.instructions
    def dynamic(ctx: RunContext[Any]) -> str:
        return f"turn {ctx.run_step}"

    _, found = survives(flow_of(agent))
    [record] = [r for r in found.values() if r.kind == "model"]
    assert record.inputs["settings"] == {"temperature": 0.5}
    assert record.inputs["messages"][0]["instructions"] == "turn 1"


def test_history_processors_shape_what_is_asked() -> None:
    from pydantic_ai.capabilities import ProcessHistory

    agent = agent_of([("look", "1", {})], returned, capabilities=[ProcessHistory(lambda messages: messages[-2:])])

    @agent.tool_plain
    def look() -> str:
        mark()
        return "seen"

    assert survives(flow_of(agent))[0]["output"] == "got seen"


# --- values --------------------------------------------------------------------------------------------------------------


class Found(BaseModel):
    title: str
    score: float


@dataclass
class Place:
    name: str


def test_binary_content_in_prompts_and_tool_returns() -> None:
    picture = BinaryContent(b"\x89PNG\x00\xff", media_type="image/png")
    agent = agent_of([("photo", "1", {})], "nice")

    @agent.tool_plain
    def photo() -> BinaryContent:
        mark()
        return picture

    async def flow() -> Any:
        result = await agent.run(["what is this?", picture])
        prompt = next(p for p in result.all_messages()[0].parts if isinstance(p, UserPromptPart))
        return [result.output, story(result), prompt.content[1] == picture]

    assert survives(flow)[0][0] == "nice"


def test_a_tools_result_stays_the_object_that_it_was() -> None:
    agent = agent_of([("find", "1", {}), ("where", "2", {}), ("raw", "3", {})], "ok")
    seen: list[Any] = []

    @agent.tool_plain
    def find() -> Found:
        mark()
        return Found(title="t", score=0.5)

    @agent.tool_plain
    def where() -> Place:
        mark()
        return Place("here")

    @agent.tool_plain
    def raw() -> ToolReturn:
        mark()
        return ToolReturn(return_value="shown", content="for the model", metadata={"kept": (1, 2)})

    async def flow() -> list[Any]:
        result = await agent.run("go")
        parts = [p for m in result.all_messages() for p in m.parts if p.part_kind == "tool-return"]
        seen[:] = [p.content for p in parts]
        return [result.output, [type(p.content).__name__ for p in parts], parts[2].metadata]

    assert survives(flow)[0] == ["ok", ["Found", "Place", "str"], {"kept": (1, 2)}]
    assert seen[0] == Found(title="t", score=0.5) and seen[1] == Place("here")


def test_a_result_that_looks_like_our_envelope_is_a_result() -> None:
    agent = agent_of([("odd", "1", {})], returned)

    @agent.tool_plain
    def odd() -> dict[str, Any]:
        mark()
        return {"pydantic_ai": {"signal": "mine"}}

    assert survives(flow_of(agent))[0]["output"] == "got {'pydantic_ai': {'signal': 'mine'}}"


class Connection:
    """Has no JSON form."""


def test_dependencies_are_not_journaled() -> None:
    agent = agent_of([("use", "1", {})], returned, deps_type=Connection)

    @agent.tool
    def use(ctx: RunContext[Connection]) -> str:
        mark()
        return type(ctx.deps).__name__

    async def flow() -> Any:
        return story(await agent.run("go", deps=Connection()))

    assert survives(flow)[0]["output"] == "got Connection"


# --- outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput, PromptedOutput])
def test_structured_output(kind: Any) -> None:
    import json

    answer = {"title": "t", "score": 1.0}
    if kind is ToolOutput:
        agent = agent_of([("final_result", "1", answer)], output_type=ToolOutput(Found))
    else:
        model = scripted(json.dumps(answer))
        model.profile = {**model.profile, "supports_json_schema_output": True}  # type: ignore[misc]
        agent = Agent(model, name="support", output_type=kind(Found), capabilities=[Durability()])
    assert survives(flow_of(agent))[0]["output"] == Found(title="t", score=1.0)


def test_an_output_function_runs_once() -> None:
    def book(ctx: RunContext[Any], title: str) -> str:
        mark()
        return f"booked {title}"

    agent = agent_of([("final_result", "1", {"title": "tea"})], output_type=ToolOutput(book))
    value, found = survives(flow_of(agent))
    assert value["output"] == "booked tea"
    assert displays(found)[-1] == "support#0/output:book[1]"


def test_a_text_output_function_that_asks_for_another_answer() -> None:
    def words(text: str) -> list[str]:
        mark()
        if "," not in text:
            raise ModelRetry("separate by commas")
        return text.split(",")

    agent = agent_of("a b", "a,b", output_type=TextOutput(words))
    assert survives(flow_of(agent))[0]["output"] == ["a", "b"]


def test_an_output_validator_runs_once_for_each_output() -> None:
    agent = agent_of("short", "long enough")

    @agent.output_validator
    def long_enough(ctx: RunContext[Any], output: str) -> str:
        if not ctx.partial_output:
            mark()
        if len(output) < 8:
            raise ModelRetry("longer")
        return output.upper()

    value, found = survives(flow_of(agent))
    assert value["output"] == "LONG ENOUGH" and sum("output" in d for d in displays(found)) == 2


def test_retries_of_the_output_end_as_they_ended() -> None:
    agent = agent_of("no", retries={"output": 1})

    @agent.output_validator
    def never(ctx: RunContext[Any], output: str) -> str:
        mark()
        raise ModelRetry("again")

    async def flow() -> str:
        try:
            await agent.run("go")
        except UnexpectedModelBehavior as error:
            return str(error)
        return "?"

    assert "output retries" in survives(flow)[0]


# --- agents in agents ----------------------------------------------------------------------------------------------------


def test_a_sub_agent_is_a_scope_in_its_tool_and_its_usage_counts() -> None:
    inner = agent_of([("check", "i1", {})], "fine", name="reviewer")

    @inner.tool_plain
    def check() -> str:
        mark()
        return "checked"

    agent = agent_of([("review", "1", {})], returned)

    @agent.tool
    async def review(ctx: RunContext[Any]) -> str:
        result = await inner.run("please", usage=ctx.usage)
        return result.output

    value, found = survives(flow_of(agent))
    assert value["output"] == "got fine" and value["usage"]["requests"] == 4 and value["usage"]["tool_calls"] == 2
    assert "support#0/tool:review[1]/reviewer#0/tool:check[i1]" in displays(found)


def test_sub_agents_in_parallel_tools_keep_their_answers_and_usage() -> None:
    inner = agent_of(lambda messages: f"about {messages[0].parts[0].content}", name="expert")
    agent = agent_of([("ask", str(i), {"topic": t}) for i, t in enumerate("xyx")], returned)

    @agent.tool
    async def ask(ctx: RunContext[Any], topic: str) -> str:
        await asyncio.sleep(0.01 if topic == "x" else 0)
        return (await inner.run(topic, usage=ctx.usage)).output

    value, _ = survives(flow_of(agent))
    assert value["output"] == "got about x, about y, about x" and value["usage"]["requests"] == 5


def test_equal_agents_in_a_gather_do_not_swap() -> None:
    agent = agent_of([("roll", "1", {})], returned)

    @agent.tool_plain
    async def roll() -> float:
        mark()
        await asyncio.sleep(random.random() * 0.005)
        return random.random()

    async def flow() -> list[Any]:
        results = await asyncio.gather(*(agent.run("same") for _ in range(3)))
        return [r.output for r in results]

    for crash_after in range(1, 9):
        objects: dict[str, bytes] = {}
        with contextlib.suppress(Crash):
            run_leg(MemoryStore(objects, crash_after=crash_after, seed=crash_after), flow)
        stood = records(objects)
        ran.clear()
        ended, _ = run_leg(MemoryStore(objects), flow)
        assert len(set(ended.value)) == 3 and not set(ran) & set(stood), crash_after
        said = {r.outcome.data["parts"][0].get("content") for r in stood.values() if r.kind == "model"} - {None}
        assert said <= set(ended.value), "an answer that stood is lost"


def test_a_chat_continues_from_its_history() -> None:
    agent = agent_of(lambda messages: f"answer {len(messages)}")

    async def flow() -> Any:
        history: Any = None
        for n in range(4):
            result = await agent.run(f"question {n}", message_history=history)
            history = result.all_messages()
        return story(result)

    value, found = survives(flow)
    assert value["output"] == "answer 7"
    last = max((r for r in found.values() if r.kind == "model"), key=lambda r: r.number)
    assert "$list" in last.inputs["messages"], "the history is stored again"


def test_run_ids_are_the_same_after_a_crash() -> None:
    agent = agent_of("hi")

    async def flow() -> Any:
        first, second = await agent.run("a"), await agent.run("a")
        ids = [r.all_messages()[-1].run_id for r in (first, second)]
        assert len(set(ids)) == 2
        return ids

    survives(flow)


# --- toolsets ------------------------------------------------------------------------------------------------------------


def _toolset(identity: str | None = "t") -> FunctionToolset[Any]:
    toolset: FunctionToolset[Any] = FunctionToolset(id=identity)

    @toolset.tool_plain
    def look() -> str:
        mark()
        return "seen"

    @toolset.tool_plain
    def hidden() -> str:
        return "never"

    return toolset


def test_prefixed_and_filtered_toolsets() -> None:
    toolset = _toolset().filtered(lambda ctx, tool: tool.name != "hidden").prefixed("shop")
    value, found = survives(flow_of(agent_of([("shop_look", "1", {})], returned, toolsets=[toolset])))
    assert value["output"] == "got seen" and "support#0/tool:look[1]" in displays(found)


@pytest.mark.parametrize("identity", ["t", None])
def test_a_toolset_given_to_the_run(identity: str | None) -> None:
    agent = agent_of([("look", "1", {})], returned)

    async def flow() -> Any:
        return story(await agent.run("go", toolsets=[_toolset(identity)]))

    value, found = survives(flow)
    assert value["output"] == "got seen" and "support#0/tool:look[1]" in displays(found)


def test_a_toolset_without_an_id_and_one_added_after_construction() -> None:
    agent = agent_of([("look", "1", {})], [("late", "2", {})], returned, toolsets=[_toolset(None)])

    @agent.toolset(id="late")
    def added(ctx: RunContext[Any]) -> FunctionToolset[Any]:
        toolset: FunctionToolset[Any] = FunctionToolset()

        @toolset.tool_plain
        def late() -> str:
            mark()
            return "late but seen"

        return toolset

    value, found = survives(flow_of(agent))
    assert value["output"] == "got late but seen"
    assert {"support#0/tool:look[1]", "support#0/tool:late[2]"} <= set(displays(found))
    assert any("tools:late" in d for d in displays(found))


class OwnToolset(AbstractToolset[Any]):
    """A leaf of a class that Pydantic AI does not know."""

    @property
    def id(self) -> str | None:
        return None

    async def get_tools(self, ctx: RunContext[Any]) -> dict[str, ToolsetTool[Any]]:
        from pydantic_ai.tools import ToolDefinition
        from pydantic_ai.toolsets.external import TOOL_SCHEMA_VALIDATOR

        definition = ToolDefinition(
            name="own", parameters_json_schema={"type": "object", "properties": {"x": {"type": "integer"}}}
        )
        return {"own": ToolsetTool(toolset=self, tool_def=definition, max_retries=1, args_validator=TOOL_SCHEMA_VALIDATOR)}

    async def call_tool(self, name: str, tool_args: dict[str, Any], ctx: RunContext[Any], tool: ToolsetTool[Any]) -> Any:
        mark()
        return tool_args["x"] + 1


def test_a_leaf_of_the_users_own_class_is_a_step_too() -> None:
    value, found = survives(flow_of(agent_of([("own", "1", {"x": 1})], returned, toolsets=[OwnToolset()])))
    assert value["output"] == "got 2" and "support#0/tool:own[1]" in displays(found)


def test_a_dynamic_toolset_that_changes_by_turn() -> None:
    from pydantic_ai.toolsets import DynamicToolset

    def of_turn(ctx: RunContext[Any]) -> FunctionToolset[Any]:
        toolset: FunctionToolset[Any] = FunctionToolset()

        def look() -> str:
            mark()
            return "seen"

        toolset.add_function(look, name=f"look_{ctx.run_step}")
        return toolset

    agent = agent_of([("look_1", "1", {})], [("look_2", "2", {})], returned, toolsets=[DynamicToolset(of_turn, id="turns")])
    value, found = survives(flow_of(agent))
    assert value["output"] == "got seen"
    assert [d for d in displays(found) if "tools:" in d] == [f"support#0/tools:turns#{n}" for n in range(3)]


SERVER = '''
import os
from mcp.server.mcpserver import MCPServer
mcp = MCPServer("shop")

@mcp.tool()
def price(item: str) -> str:
    """Price of an item."""
    with open(os.environ["CALLS"], "a") as file:
        file.write(item + "\\n")
    return f"{item} costs 3"

mcp.run(**({"transport": "streamable-http", "port": int(os.environ["PORT"])} if "PORT" in os.environ else {}))
'''


def test_an_mcp_server_over_stdio(tmp_path: Path) -> None:
    from fastmcp.client.transports import StdioTransport
    from pydantic_ai.mcp import MCPToolset

    script, calls = tmp_path / "server.py", tmp_path / "calls"
    script.write_text(SERVER)
    transport = StdioTransport(sys.executable, [str(script)], env={"CALLS": str(calls)}, keep_alive=False)
    agent = agent_of([("price", "1", {"item": "tea"})], returned, toolsets=[MCPToolset(transport, id="shop")])
    value, found = survives(flow_of(agent), at=[0, 1, 2, 3])
    assert "tea costs 3" in value["output"]
    assert "support#0/tools:shop#0" in displays(found) and "support#0/tool:price[1]" in displays(found)


def test_an_mcp_server_over_http(tmp_path: Path) -> None:
    from pydantic_ai.mcp import MCPToolset

    script, calls = tmp_path / "server.py", tmp_path / "calls"
    script.write_text(SERVER)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "CALLS": str(calls), "PORT": str(port)})
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.1)

        async def flow() -> Any:  # a session belongs to its loop, so each leg makes its own
            toolset: MCPToolset[Any] = MCPToolset(f"http://127.0.0.1:{port}/mcp", id="shop")
            return story(await agent_of([("price", "1", {"item": "tea"})], returned, toolsets=[toolset]).run("go"))

        value, found, _ = whole(flow)
        assert "tea costs 3" in value["output"] and len(calls.read_text().splitlines()) == 1
        tool = max(r.number for r in found.values() if r.kind == "tool")
        objects: dict[str, bytes] = {}
        with contextlib.suppress(Crash):
            run_leg(MemoryStore(objects, crash_after=tool + 1), flow)
        ended, _ = run_leg(MemoryStore(objects), flow)
        assert ended.value == value and len(calls.read_text().splitlines()) == 2, "a finished call was made again"
    finally:
        server.terminate()
        server.wait()


# --- events ---------------------------------------------------------------------------------------------------------------


def test_events_of_parallel_tools_that_end_in_any_order_are_heard_once() -> None:
    heard: list[Any] = []

    async def hear(ctx: RunContext[Any], events: Any) -> None:
        async for event in events:
            if event.event_kind.startswith("function_tool"):
                heard.append(current_step().path)

    agent = agent_of([("look", str(i), {"x": i}) for i in range(4)], returned, durability=Durability(event_stream_handler=hear))

    @agent.tool_plain
    async def look(x: int) -> int:
        mark()
        await asyncio.sleep(random.random() * 0.01)
        return x

    agent.model = _streaming(agent.model)
    for seed in range(12):
        objects: dict[str, bytes] = {}
        heard.clear()
        with contextlib.suppress(Crash):
            run_leg(MemoryStore(objects, crash_after=seed, seed=seed), flow_of(agent))
        stood, before = records(objects), list(heard)
        heard.clear()
        ended, _ = run_leg(MemoryStore(objects), flow_of(agent))
        assert ended.error is None, ended.error
        assert not set(heard) & set(stood) and len(set(before) | set(heard)) == 8


def _streaming(model: Any) -> Any:
    """The same script, streamed."""
    from pydantic_ai.models.function import DeltaToolCall, FunctionModel

    async def stream(messages: Any, info: Any) -> Any:
        for part in model.function(messages, info).parts:
            if isinstance(part, ToolCallPart):
                call = DeltaToolCall(part.tool_name, part.args_as_json_str(), tool_call_id=part.tool_call_id)
                yield {int(part.tool_call_id): call}
            else:
                yield part.content

    return FunctionModel(stream_function=stream)


# --- limits and options --------------------------------------------------------------------------------------------------


def test_usage_limits_stop_at_the_same_point() -> None:
    agent = agent_of([("look", "1", {})], [("look", "2", {})], "never")

    @agent.tool_plain
    def look() -> str:
        mark()
        return "seen"

    async def flow() -> str:
        try:
            await agent.run("go", usage_limits=UsageLimits(request_limit=2))
        except UsageLimitExceeded as error:
            return str(error)
        return "?"

    assert "request_limit of 2" in survives(flow)[0]


def test_a_plain_tool_is_no_step() -> None:
    agent = agent_of([("look", "1", {}), ("pay", "2", {})], returned)
    calls: list[str] = []

    @agent.tool_plain(metadata={"kitaru": False})
    def look() -> str:
        calls.append("look")
        return "seen"

    @agent.tool_plain
    def pay() -> str:
        mark()
        return "paid"

    _, found = survives(flow_of(agent))
    assert [d for d in displays(found) if "tool:" in d] == ["support#0/tool:pay[2]"] and len(calls) > 1
    _, found, _ = whole(flow_of(_plain_by_default()))
    assert [d for d in displays(found) if "tool:" in d] == ["support#0/tool:pay[2]"]


def _plain_by_default() -> Agent[Any, Any]:
    agent = agent_of([("look", "1", {}), ("pay", "2", {})], returned, durability=Durability(tools="plain"))
    agent.tool_plain(lambda: "seen", name="look")
    agent.tool_plain(lambda: "paid", name="pay", metadata={"kitaru": True})
    return agent


def test_tools_and_models_are_retried_and_timed_by_their_options() -> None:
    attempts = {"pay": 0, "model": 0}

    def flaky_model(messages: Any) -> str:
        attempts["model"] += 1
        if attempts["model"] == 1:
            raise ConnectionError("no route")
        return returned(messages)

    durability = Durability(model_steps={"retries": 1, "retry_delay": 0.01})
    agent = agent_of([("pay", "1", {}), ("slow", "2", {})], flaky_model, durability=durability)

    @agent.tool_plain(metadata={"kitaru": {"retries": 2, "retry_delay": 0.01, "retry_on": ConnectionError}})
    def pay() -> str:
        attempts["pay"] += 1
        if attempts["pay"] < 3:
            raise ConnectionError("busy")
        return "paid"

    @agent.tool_plain(metadata={"kitaru": {"timeout": 5}})
    async def slow() -> str:
        return "in time"

    value, found, _ = whole(flow_of(agent))
    assert value["output"] == "got paid, in time" and attempts == {"pay": 3, "model": 2}
    assert [len(r.attempts) for r in found.values() if r.key == "1"] == [2]


def test_a_wrong_option_is_said_at_once() -> None:
    with pytest.raises(UserError, match="no step option `retry`"):
        Durability(model_steps={"retry": 1})


def test_a_tool_may_be_at_most_once_and_gets_an_idempotency_key() -> None:
    agent = agent_of([("pay", "1", {})], returned)
    keys: list[str] = []

    @agent.tool_plain(metadata={"kitaru": {"at_most_once": True}})
    def pay() -> str:
        mark()
        keys.append(current_step().idempotency_key)
        return "paid"

    value, found, _ = whole(flow_of(agent))
    assert value["output"] == "got paid" and keys[0]
    assert [r.at_most_once for r in found.values() if r.kind == "tool"] == [True]


def test_redaction_keeps_secrets_out_of_inputs_and_says_so() -> None:
    def redact(step: str, inputs: dict[str, Any]) -> dict[str, Any]:
        if step == "tool:login":
            inputs["password"] = "***"
        return inputs

    agent = agent_of([("login", "1", {"user": "bo", "password": "hunter2"})], returned, durability=Durability(redact=redact))
    got: list[str] = []

    @agent.tool_plain
    def login(user: str, password: str) -> str:
        got.append(password)
        return "in"

    _, found, _ = whole(flow_of(agent))
    [record] = [r for r in found.values() if r.kind == "tool"]
    assert record.inputs == {"user": "bo", "password": "***"} and record.metadata["redacted"] == ["password"]
    assert set(got) == {"hunter2"}


def test_checkpoints_inside_a_tool_are_steps_of_it() -> None:
    @checkpoint
    def charge(amount: int) -> str:
        mark()
        return f"charged {amount}"

    agent = agent_of([("pay", "1", {"amount": 3})], returned)

    @agent.tool_plain
    def pay(amount: int) -> str:
        return charge(amount)

    _, found = survives(flow_of(agent))
    assert "support#0/tool:pay[1]/charge#0" in displays(found)


def test_a_timeout_of_the_run_counts_from_its_recorded_start() -> None:
    agent = agent_of("in time")
    _, found = survives(flow_of(agent, timeout=60))
    assert "support.start#0" in displays(found)


def test_spans_of_what_was_replayed_are_not_sent_again() -> None:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from pydantic_ai.capabilities import Instrumentation
    from pydantic_ai.models.instrumented import InstrumentationSettings

    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    settings = InstrumentationSettings(tracer_provider=provider)
    agent = agent_of([("look", "1", {})], [("look", "2", {})], returned, capabilities=[Instrumentation(settings)])

    @agent.tool_plain
    def look() -> str:
        mark()
        return "seen"

    objects: dict[str, bytes] = {}
    with contextlib.suppress(Crash):
        run_leg(MemoryStore(objects, crash_after=3), flow_of(agent))
    exporter.clear()
    ended, _ = run_leg(MemoryStore(objects), flow_of(agent))
    assert ended.error is None
    names = [span.name.split(" ")[0] for span in exporter.get_finished_spans()]
    assert names.count("chat") == 1 and names.count("execute_tool") == 1, names


# --- around --------------------------------------------------------------------------------------------------------------


def test_an_agent_without_a_name_is_refused() -> None:
    with pytest.raises(UserError, match="unique `name`"):
        Agent(scripted("hi"), capabilities=[Durability()])


def test_outside_a_flow_the_agent_is_a_plain_agent() -> None:
    agent = agent_of([("look", "1", {})], returned, toolsets=[_toolset()])
    ran.clear()
    assert agent.run_sync("go").output == "got seen" and ran == ["model", "", "model"]


def test_an_agent_in_a_thread_that_lost_the_run_is_refused() -> None:
    agent = agent_of("hi")

    async def flow() -> str:
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(None, lambda: agent.run_sync("go"))
        except NotInRun:
            return "refused"
        return "ran plainly"

    assert whole(flow)[0] == "refused"


def test_an_agent_changed_between_crash_and_resume_is_drift() -> None:
    from kitaru_zenml.errors import InputsDrifted

    objects: dict[str, bytes] = {}
    run_leg(MemoryStore(objects), flow_of(agent_of("hi", instructions="be brief")))
    objects = {name: data for name, data in objects.items() if "simulated" not in name}
    ended, _ = run_leg(MemoryStore(objects), flow_of(agent_of("hi", instructions="be long")))
    assert isinstance(ended.error, InputsDrifted) and "messages" in str(ended.error)
    assert records(objects)


def test_a_response_may_be_text_parts_alone() -> None:
    agent = agent_of(ModelResponse(parts=[TextPart("a"), TextPart("b")]))
    assert survives(flow_of(agent))[0]["output"] == "ab"
