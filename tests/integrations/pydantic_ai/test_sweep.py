"""SIGKILL at store operations of an agent with parallel tools, a sub-agent, approvals and a streamed answer, over real HTTP.

No finished model call or tool call runs again, usage and history are the uninterrupted run's, and the server has counted as many requests
as there are model steps, plus those whose answer died with the process before it was stored.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from kitaru_zenml.journal.inbox import Inbox
from kitaru_zenml.journal.journal import Journal
from tests.crash.harness import MAX_LEGS, Case, check
from tests.crash.killing import WHEN
from tests.openai_server import OpenAIServer

FLOW = "tests.integrations.pydantic_ai.flows:support_flow"
CLERK = "tests.integrations.pydantic_ai.flows:clerk_flow"
SAMPLE = 5


def play(case: Case, flow: str, at: int = 10**9, when: str = "before") -> tuple[dict[str, Any], int]:
    """Run until it has completed, answering what it asks; returns the last leg's answer and the number of legs that were killed."""
    leg, killed = case.start("run", flow=flow, at=at, when=when), 0
    for _ in range(MAX_LEGS):
        if leg.wait() == -9:
            killed += 1
        else:
            answer = leg.answer
            if answer.get("error") == "RunFinished":
                leg = case.start("look", run=case.run)
                answer = leg.answer
            if answer.get("status") == "completed":
                return check(case, answer, leg), killed
            assert answer.get("status") == "paused", f"{answer}\n{leg.log.read_text()[-3000:]}"
        if case.run is None:
            leg = case.start("run", flow=flow)
            continue
        answer_all(case)
        stored, effects = case.recorded(), len(case.effect_lines())
        leg = case.start("resume", run=case.run)
        leg.wait()
        again = [line for line in case.effect_lines()[effects:] if line[0] in stored]
        assert not again, f"finished steps ran again: {again}"
        assert stored <= case.recorded(), "records were lost"
    raise AssertionError("the run does not complete")


def answer_all(case: Case) -> None:
    """Approve the refund, deny the rest."""
    assert case.run is not None
    journal = Journal(case.store, case.run)
    inbox = Inbox(journal)
    inbox.refresh()
    for wait in [w for w in journal.open_waits() if w.kind == "wait" and inbox.answer(w.key) is None]:
        value = True if "refund" in wait.display else {"approve": False, "message": "denied by a person"}
        told = case.start("answer", run=case.run, wait=wait.display, value=value).answer
        assert "error" not in told, told


def model_steps(case: Case) -> int:
    assert case.run is not None
    return sum(r.kind == "model" for r in Journal(case.store, case.run).load().records.values())


def points(operations: int) -> list[tuple[int, str]]:
    every = [(at, when) for at in range(1, operations + 1) for when in WHEN]
    if os.environ.get("KITARU_SWEEP") == "all":
        return every
    return sorted(random.Random("support").sample(every, min(SAMPLE, len(every))))


@pytest.mark.sweep
@pytest.mark.timeout(7200)
def test_an_agent_killed_at_any_store_operation_repeats_nothing(
    agent_case: Callable[[], Case], server: OpenAIServer, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, before = agent_case(), len(server.requests)
    answer, _ = play(whole, FLOW)
    expected = answer["result"]
    assert len(server.requests) - before == model_steps(whole) == 5
    effects = sorted(line[3] for line in whole.effect_lines())
    tried = killed_legs = repeated_requests = 0
    for at, when in points(len(whole.legs[0].operations)):
        case, before = agent_case(), len(server.requests)
        answer, killed = play(case, FLOW, at, when)
        assert answer["result"] == expected, (at, when)
        requests, tried, killed_legs = len(server.requests) - before, tried + 1, killed_legs + killed
        in_flight = (
            killed * 2
        )  # at the kill a request of the agent and one of its sub-agent may have been unanswered or not yet stored
        assert 5 <= requests <= 5 + in_flight, (at, when, requests)
        repeated_requests += requests - 5
        assert model_steps(case) == 5
        done = {line[3] for line in case.effect_lines()}
        assert done == set(effects), (at, when)
    with capsys.disabled():
        print(f"\n{tried} points, {killed_legs} legs killed, {repeated_requests} requests whose answer was not stored yet")


@pytest.mark.sweep
def test_an_agent_in_a_sync_flow_is_killed_after_each_record(agent_case: Callable[[], Case], server: OpenAIServer) -> None:
    whole = agent_case()
    answer, _ = play(whole, CLERK)
    creates = [i for i, line in enumerate(whole.legs[0].operations, 1) if "create" in line and "/steps/" in line]
    assert len(creates) == 4
    for at in creates:
        case, before = agent_case(), len(server.requests)
        resumed, killed = play(case, CLERK, at, "after")
        assert killed == 1 and resumed["result"] == answer["result"]
        assert len(server.requests) - before == model_steps(case) == 2, "a model call whose record stood was repeated"
        assert len(case.effect_lines()) == 1
