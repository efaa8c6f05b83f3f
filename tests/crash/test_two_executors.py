"""Two live executors of one run: one is refused, or superseded; neither can corrupt what the other stores."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kitaru_zenml.journal.journal import Journal
from tests.crash.harness import Case, Leg

SLOW = {"CRASH_STEP_SECONDS": "0.3"}


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to this"
        time.sleep(0.02)


def started(case: Case, steps: int = 2) -> Leg:
    """A leg that is mid-run."""
    leg = case.start("run", flow="stoppable")
    until(lambda: case.run is not None and len(case.recorded()) >= steps)
    return leg


def hooks(case: Case) -> list[str]:
    file = Path(f"{case.effects}.hooks")
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("kind", ["local", "moto"])
def test_a_stopped_executor_that_was_taken_over_touches_nothing_when_it_goes_on(
    kind: str, new_case: Callable[..., Case]
) -> None:
    case = new_case(kind, **SLOW)
    first = started(case)
    first.stop(case.zygote.database)
    answer = case.start("resume", run=case.run, takeover=True).answer
    assert answer["status"] == "completed" and not answer["problems"] and not answer["differences"]
    effects = len(case.effect_lines())
    os.kill(first.pid, signal.SIGCONT)
    assert first.answer["error"] == "LeaseLost"
    assert len(case.effect_lines()) - effects <= 1, "it went on past its next boundary"
    after = case.start("look", run=case.run).answer
    assert (after["status"], after["result"], after["steps"]) == ("completed", answer["result"], answer["steps"])
    assert not after["problems"] and not after["differences"]
    assert not hooks(case), "the superseded executor ran the flow's failure hook"


def test_a_stopped_executor_is_superseded_when_its_lease_has_lapsed(new_case: Callable[..., Case]) -> None:
    case = new_case(**SLOW)
    first = started(case)
    first.stop(case.zygote.database)
    began = time.monotonic()
    answer = case.start("resume", run=case.run).answer  # waits for `lapse_seconds`, 2
    assert answer.get("status") == "completed" and time.monotonic() - began > 2, answer
    os.kill(first.pid, signal.SIGCONT)
    assert first.answer["error"] == "LeaseLost"
    assert case.start("look", run=case.run).answer["status"] == "completed"


def test_a_second_executor_is_refused_while_the_first_lives(new_case: Callable[..., Case]) -> None:
    case = new_case(**SLOW)
    first = started(case)
    refused = case.start("resume", run=case.run).answer
    assert refused["error"] == "RunIsLeased" and f"process {first.pid}" in refused["message"] and "UTC" in refused["message"]
    assert first.answer["status"] == "completed"
    assert len(case.effect_lines()) == 12


def test_a_live_executor_that_is_taken_over_stops_at_a_boundary(new_case: Callable[..., Case]) -> None:
    case = new_case(**SLOW)
    first = started(case)
    second = case.start("resume", run=case.run, takeover=True)
    assert first.answer["error"] == "LeaseLost"
    answer = second.answer
    assert answer["status"] == "completed" and not answer["problems"] and not answer["differences"]
    assert not hooks(case)
    result, kept = answer["result"], {tuple(r.outcome.data) for r in records(case) if r.path != "/"}  # type: ignore[union-attr]
    assert {tuple(item) for item in result} <= kept, "a result that no record holds"


def records(case: Case) -> list:  # type: ignore[type-arg]
    assert case.run is not None
    return list(Journal(case.store, case.run).load().records.values())


def test_of_two_resumes_at_once_one_runs_and_one_is_refused(new_case: Callable[..., Case]) -> None:
    case = new_case(**SLOW)
    first = started(case)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    racing = [case.start("resume", run=case.run) for _ in range(2)]
    answers = [leg.answer for leg in racing]
    assert sorted(a.get("error", a.get("status")) for a in answers) in (
        ["RunIsLeased", "completed"],
        ["RunFinished", "completed"],
    )
    winner = next(a for a in answers if "status" in a)
    assert not winner["problems"] and not winner["differences"]
    assert len(case.effect_lines()) <= 13, "only the step in flight at the kill may run again"


def test_a_holder_of_this_host_that_is_gone_is_superseded_at_once(new_case: Callable[..., Case]) -> None:
    case = new_case(**SLOW)
    first = started(case)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    leases = len(Journal(case.store, str(case.run)).leases())
    second = case.start("resume", run=case.run)
    until(lambda: len(Journal(case.store, str(case.run)).leases()) > leases, 1.9 + 2)
    assert second.answer["status"] == "completed"
