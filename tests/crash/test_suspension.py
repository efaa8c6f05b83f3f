"""Runs that wait, with SIGKILL at store operations of the leg, of the resume, and of whoever answers, sends or cancels."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from kitaru_zenml.journal.inbox import Inbox
from kitaru_zenml.journal.journal import Journal
from tests.crash.harness import MAX_LEGS, Case, check, without_random_parts
from tests.crash.killing import WHEN

STORES = ["local", "moto", pytest.param("ceph", marks=pytest.mark.ceph)]
VICTIMS = ["run", "resume", "answer", "send"]
SAMPLE = {"local": 4, "moto": 1, "ceph": 1}  # points a victim in CI
OPERATIONS = {"run": 18, "resume": 20, "answer": 10, "send": 6}  # of the flow below, about


class Story:
    """One run of `waiting`, in which one process is killed at one point, and people go on as they would."""

    def __init__(self, case: Case, victim: str, at: int, when: str) -> None:
        self.case, self.victim, self.kill = case, victim, {"at": at, "when": when}
        self.killed = False

    def act(self, do: str, **order: Any) -> dict[str, Any] | None:
        """A process that does something; `None` if it was killed on the way."""
        order |= self.kill if do == self.victim and not self.killed else {}
        leg = self.case.start(do, **order)
        if leg.wait() == -9:
            self.killed = True
            return None
        return leg.answer

    def play(self) -> dict[str, Any]:
        """Until the run has completed."""
        case = self.case
        answer = self.act("run", flow="waiting")
        assert case.run is not None or self.killed, answer
        if case.run is None:
            return self.play()
        for _ in range(MAX_LEGS):
            self.answer_all()
            self.act("send", run=case.run, event="orders", payload="tea", key="the only one")
            stored, effects = case.recorded(), len(case.effect_lines())
            answer = self.act("resume", run=case.run)
            again = [line for line in case.effect_lines()[effects:] if line[0] in stored]
            assert not again, f"finished steps ran again: {again}"
            assert stored <= case.recorded(), "records were lost"
            if answer is not None and (answer.get("status") == "completed" or answer.get("error") == "RunFinished"):
                leg = case.start("look", run=case.run)
                return check(case, leg.answer, leg)
            assert answer is None or answer.get("status") == "paused", answer
        raise AssertionError("the run does not complete")

    def answer_all(self) -> None:
        """Every question gets its answer; if the process that answers dies, somebody does it again."""
        assert self.case.run is not None
        journal = Journal(self.case.store, self.case.run)
        inbox = Inbox(journal)
        inbox.refresh()
        for wait in [w for w in journal.open_waits() if w.kind == "wait" and inbox.answer(w.key) is None]:
            told = {"run": self.case.run, "wait": wait.display, "value": f"to {wait.question}"}
            answer = self.act("answer", **told)
            if answer is None:
                answer = self.act("answer", **told)
            assert answer is not None and answer["value"] == f"to {wait.question}"


def points(kind: str, victim: str) -> list[tuple[int, str]]:
    every = [(at, when) for at in range(1, OPERATIONS[victim] + 1) for when in WHEN]
    if os.environ.get("KITARU_SWEEP") == "all":
        return every
    return sorted(random.Random(f"{kind} {victim}").sample(every, SAMPLE[kind]))


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("victim", VICTIMS)
def test_a_run_that_waits_survives_the_death_of_any_process(kind: str, victim: str, new_case: Callable[..., Case]) -> None:
    killed = 0
    for at, when in points(kind, victim):
        story = Story(new_case(kind), victim, at, when)
        result = without_random_parts(story.play()["result"])
        killed += story.killed
        branches = [
            [["before 0"], "to branch 0", ["after 0 to branch 0"]],
            [["before 1"], "to branch 1", ["after 1 to branch 1"]],
        ]
        assert result == [[*branches, [["nested inside"], "to inner nested"]], "tea", ["last tea"]], (at, when)
    assert killed or kind != "local"


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_two_people_who_answer_at_once_give_one_answer(new_case: Callable[..., Case]) -> None:
    case = new_case()
    assert case.start("run", flow="waiting").answer["status"] == "paused"
    [wait, *_] = Journal(case.store, str(case.run)).open_waits()
    legs = [case.start("answer", run=case.run, wait=wait.display, value=f"{i}", by=f"person {i}") for i in range(4)]
    answers = [leg.answer for leg in legs]
    assert sorted(a.get("error", "accepted") for a in answers) == ["AlreadyAnswered"] * 3 + ["accepted"]
    inbox = Inbox(Journal(case.store, str(case.run)))
    inbox.refresh()
    winner = next(a for a in answers if "value" in a)
    assert inbox.answer(wait.key).value == winner["value"]  # type: ignore[union-attr]


@pytest.mark.sweep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("victim", ["run", "resume"])
def test_a_parent_that_is_killed_starts_no_child_twice(victim: str, new_case: Callable[..., Case]) -> None:
    every = [(at, when) for at in range(1, 16) for when in WHEN]
    for at, when in every if os.environ.get("KITARU_SWEEP") == "all" else random.Random(victim).sample(every, 4):
        case = new_case()
        kill = {"at": at, "when": when}
        case.start("run", flow="parenting", **(kill if victim == "run" else {"at": 5, "when": "after"})).wait()
        for n in range(MAX_LEGS):
            if case.run is None:
                case.start("run", flow="parenting").wait()
            leg = case.start("resume", run=case.run, **(kill if victim == "resume" and n == 0 else {}))
            if leg.wait() == 0 and leg.answer.get("status") in (None, "completed"):
                break
        leg = case.start("look", run=case.run)
        answer = check(case, leg.answer, leg)
        assert without_random_parts(answer["result"]) == [["meanwhile"], [["child 0"], ["child 1"]], ["joined"]], (at, when)
        children = [run for run in case.new_runs() if Journal(case.store, run).info().parent == case.run]  # type: ignore[union-attr]
        assert len(children) == 2, "a child was started twice"


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_a_cancellation_that_is_killed_is_finished_by_the_next(new_case: Callable[..., Case]) -> None:
    every = [(at, when) for at in range(1, 16) for when in WHEN]
    for at, when in every if os.environ.get("KITARU_SWEEP") == "all" else random.Random("cancel").sample(every, 4):
        case = new_case()
        assert case.start("run", flow="undoable").answer["status"] == "paused"
        if case.start("cancel", run=case.run, reason="enough", at=at, when=when).wait() == -9:
            case.start("cancel", run=case.run, reason="enough").wait()
        answer = case.start("look", run=case.run).answer
        assert answer["status"] == "stopped" and not answer["problems"] and not answer["differences"], (at, when, answer)
        undone = {line[1] for line in case.effect_lines() if line[3] == "undo enough"}
        assert len(undone) == 1 and answer["steps"] == ["call#0", "on_cancel#0"], (at, when)


def test_a_suspended_run_holds_no_process(new_case: Callable[..., Case]) -> None:
    case = new_case()
    leg = case.start("run", flow="waiting")
    assert leg.answer["status"] == "paused" and leg.exit == 0
    journal = Journal(case.store, str(case.run))
    beat = journal.beat(journal.leases()[-1].epoch)
    assert beat is not None and beat.released
    assert not os.path.exists(f"/proc/{leg.pid}")
