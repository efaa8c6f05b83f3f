"""Approvals, questions and outside results as waits of the run: several open at once, answered in any order, with crashes between."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic_ai import Agent, RunContext
from pydantic_ai.capabilities import RequestInput
from pydantic_ai.exceptions import ApprovalRequired, CallDeferred, UnexpectedModelBehavior
from pydantic_ai.tools import DeferredToolRequests, DeferredToolResults, ToolApproved, ToolDenied

from kitaru_zenml import engine, execution, wait
from kitaru_zenml.errors import RunSuspended
from kitaru_zenml.journal.inbox import Inbox, put_answer
from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.records import Answer, OpenWait
from kitaru_zenml.options import FlowOptions
from kitaru_zenml_pydantic_ai import Durability
from tests.integrations.pydantic_ai.crashing import mark, ran, records, returned, scripted, story
from tests.simulation import Crash, MemoryStore, run_leg

Answers = Callable[[OpenWait], Any]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ran.clear()
    monkeypatch.setattr(engine, "QUIET", 0.05)
    monkeypatch.setattr(engine, "LOOK", 0.005)
    monkeypatch.setattr(execution, "WATCH_OPEN", 0.02)


def ask(ctx: RunContext[Any], requests: DeferredToolRequests, token: str) -> DeferredToolResults | None:
    return None


def agent_of(*turns: Any, request: RequestInput[Any] | None = None, **options: Any) -> Agent[Any, Any]:
    capabilities = [request or RequestInput(ask), Durability()]
    return Agent(scripted(*turns), name=options.pop("name", "support"), capabilities=capabilities, **options)


def play(flow: Any, answers: Answers, *, seed: int | None = None) -> tuple[Any, list[list[OpenWait]]]:
    """Run a flow to its end; with a seed it crashes at random, and one open wait is answered at a time. The waits of each suspension."""
    choose, objects, asked = random.Random(seed), dict[str, bytes](), []
    for _ in range(60):
        dies = seed is not None and choose.random() < 0.4
        stood, before = set(records(objects)), Counter(ran)
        try:
            store = MemoryStore(objects, crash_after=choose.randint(0, 3) if dies else None, seed=choose.random())
            ended, _ = run_leg(store, flow, options=FlowOptions(grace=0))
        except Crash:
            continue
        finally:
            assert not set(Counter(ran) - before) & stood, "a finished step ran again"
        if ended.error is None:
            return ended.value, asked
        if not isinstance(ended.error, RunSuspended):
            raise ended.error
        journal = Journal(MemoryStore(objects), "run")
        inbox = Inbox(journal)
        inbox.refresh()
        open_waits = [w for w in journal.open_waits() if inbox.answer(w.key) is None]
        asked.append(open_waits)
        for question in open_waits if seed is None else choose.sample(open_waits, 1):
            answer = Answer(nonce=new_nonce(), run_id="run", wait=question.key, value=answers(question), at=datetime.now(UTC))
            put_answer(journal, answer)
    raise AssertionError("the run does not end")


def in_any_order(flow: Any, answers: Answers, seeds: int = 4) -> tuple[Any, list[list[OpenWait]]]:
    """The end of a flow, the same with crashes and answers in any order."""
    value, asked = play(flow, answers)
    for seed in range(seeds):
        ran.clear()
        assert play(flow, answers, seed=seed)[0] == value, seed
    return value, asked


def flow_of(agent: Agent[Any, Any]) -> Any:
    async def flow() -> Any:
        return story(await agent.run("go"))

    return flow


def test_approvals_are_waits_open_together_with_tool_and_arguments() -> None:
    agent = agent_of(
        [("pay", "1", {"to": "ann", "amount": 5}), ("pay", "2", {"to": "bob", "amount": 7}), ("look", "3", {})], returned
    )

    @agent.tool_plain(requires_approval=True)
    def pay(to: str, amount: int) -> str:
        mark()
        return f"paid {amount} to {to}"

    @agent.tool_plain
    def look() -> str:
        mark()
        return "seen"

    def answers(question: OpenWait) -> Any:
        return {"approve": False, "message": "too much"} if question.metadata["arguments"]["to"] == "bob" else True

    value, asked = in_any_order(flow_of(agent), answers)
    assert value["output"] == "got paid 5 to ann, too much, seen"
    assert [len(waits) for waits in asked] == [2]
    [first] = [w for w in asked[0] if w.metadata["tool_call_id"] == "1"]
    assert (
        first.display.startswith("support#0/approve:pay")
        and first.question == 'May the agent call pay({"to":"ann","amount":5})?'
    )
    assert first.metadata["tool"] == "pay" and first.metadata["arguments_digest"]


def test_an_approval_with_other_arguments() -> None:
    agent = agent_of([("pay", "1", {"amount": 500})], returned)

    @agent.tool_plain(requires_approval=True)
    def pay(amount: int) -> str:
        mark()
        return f"paid {amount}"

    value, _ = in_any_order(flow_of(agent), lambda question: {"approve": True, "arguments": {"amount": 50}})
    assert value["output"] == "got paid 50"


def test_a_tool_that_asks_for_approval_while_it_runs() -> None:
    agent = agent_of([("pay", "1", {"amount": 500}), ("pay", "2", {"amount": 1})], returned)

    @agent.tool
    def pay(ctx: RunContext[Any], amount: int) -> str:
        mark()
        if amount > 100 and not ctx.tool_call_approved:
            raise ApprovalRequired(metadata={"reason": "large"})
        return f"paid {amount}"

    value, asked = in_any_order(flow_of(agent), lambda question: True)
    assert value["output"] == "got paid 500, paid 1"
    assert asked[0][0].metadata["metadata"] == {"reason": "large"}


def test_outside_results_and_questions_are_waits() -> None:
    agent = agent_of([("lab", "1", {"sample": "x"}), ("which", "2", {})], returned)

    @agent.tool_plain
    def lab(sample: str) -> str:
        mark()
        raise CallDeferred

    @agent.tool_plain
    def which() -> str:
        mark()
        raise CallDeferred(kind="question")

    value, asked = in_any_order(flow_of(agent), lambda w: {"value": 7} if "result:lab" in w.display else "the blue one")
    assert value["output"] == "got {'value': 7}, the blue one"
    assert sorted(w.scope.name for w in asked[0]) == ["question:which", "result:lab"]


def test_what_ask_answers_itself_is_asked_once() -> None:
    asked: list[str] = []

    def policy(ctx: RunContext[Any], requests: DeferredToolRequests, token: str) -> DeferredToolResults | None:
        asked.append(token)
        mark()
        return requests.build_results(approve_all=True)

    agent = agent_of([("pay", "1", {})], returned, request=RequestInput(policy))

    @agent.tool_plain(requires_approval=True)
    def pay() -> str:
        mark()
        return "paid"

    value, suspensions = in_any_order(flow_of(agent), lambda question: None)
    assert value["output"] == "got paid" and not suspensions and len(set(asked)) == 1


def test_time_runs_out_for_one_call_and_not_for_the_others() -> None:
    agent = agent_of([("pay", "1", {})], returned, request=RequestInput(ask, timeout=timedelta(seconds=0.3)))

    @agent.tool_plain(requires_approval=True)
    def pay() -> str:
        return "paid"

    async def flow() -> Any:
        return (await agent.run("go")).output

    objects: dict[str, bytes] = {}
    ended, _ = run_leg(MemoryStore(objects), flow, options=FlowOptions(grace=5))
    assert "No decision on this tool call arrived" in str(ended.value)


def test_the_approval_of_a_sub_agent_inside_a_tool() -> None:
    inner = agent_of([("pay", "i1", {"amount": 3})], returned, name="clerk")

    @inner.tool_plain(requires_approval=True)
    def pay(amount: int) -> str:
        mark()
        return f"paid {amount}"

    agent = Agent(scripted([("delegate", "1", {}), ("delegate", "2", {})], returned), name="boss", capabilities=[Durability()])

    @agent.tool
    async def delegate(ctx: RunContext[Any]) -> str:
        return (await inner.run("do it", usage=ctx.usage)).output

    value, asked = in_any_order(flow_of(agent), lambda question: True, seeds=3)
    assert value["output"] == "got got paid 3, got paid 3" and value["usage"]["requests"] == 6
    assert [len(waits) for waits in asked] == [2]
    assert asked[0][0].display.startswith("boss#0/tool:delegate[")


def test_deferred_requests_as_output_with_a_wait_in_the_flow() -> None:
    agent = Agent(
        scripted([("pay", "1", {"amount": 3})], returned), name="support", output_type=[str, DeferredToolRequests],
        capabilities=[Durability()],
    )  # fmt: skip

    @agent.tool_plain(requires_approval=True)
    def pay(amount: int) -> str:
        mark()
        return f"paid {amount}"

    async def flow() -> Any:
        result = await agent.run("go")
        assert isinstance(result.output, DeferredToolRequests)
        results = DeferredToolResults()
        for call in result.output.approvals:
            approved = await wait("approve", schema=bool, question=f"{call.tool_name} {call.args_as_json_str()}")
            results.approvals[call.tool_call_id] = ToolApproved() if approved else ToolDenied("no")
        again = await agent.run(message_history=result.all_messages(), deferred_tool_results=results)
        return again.output

    assert in_any_order(flow, lambda question: True)[0] == "got paid 3"


def test_two_pending_calls_of_one_id_are_refused() -> None:
    agent = agent_of([("pay", "same", {"amount": 1}), ("pay", "same", {"amount": 2})], returned)

    @agent.tool_plain(requires_approval=True)
    def pay(amount: int) -> str:
        return f"paid {amount}"

    with pytest.raises(UnexpectedModelBehavior, match="duplicate ids"):
        play(flow_of(agent), lambda question: True)


def test_an_answer_that_does_not_fit_is_refused_and_asked_again() -> None:
    agent = agent_of([("pay", "1", {})], returned)

    @agent.tool_plain(requires_approval=True)
    def pay() -> str:
        mark()
        return "paid"

    objects: dict[str, bytes] = {}
    journal = Journal(MemoryStore(objects), "run")
    run_leg(MemoryStore(objects), flow_of(agent), options=FlowOptions(grace=0))
    [question] = journal.open_waits()
    for number, value in enumerate(["perhaps", True]):
        put_answer(
            journal,
            Answer(nonce=new_nonce(), run_id="run", wait=question.key, number=number, value=value, at=datetime.now(UTC)),
        )
        ended, _ = run_leg(MemoryStore(objects), flow_of(agent), options=FlowOptions(grace=0))
    assert ended.error is None and ended.value["output"] == "got paid"


def test_a_sync_flow_waits_too() -> None:
    agent = agent_of([("pay", "1", {})], returned)

    @agent.tool_plain(requires_approval=True)
    def pay() -> str:
        mark()
        return "paid"

    assert in_any_order(lambda: agent.run_sync("go").output, lambda question: True)[0] == "got paid"
