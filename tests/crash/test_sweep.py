"""Every store operation of six flows is a crash point: before it, in the middle of it, after it.

CI takes a sample, the same one each day; `make crash-sweep` (KITARU_SWEEP=all) takes all.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from tests.crash.harness import Case, Tally, crash_and_resume, without_random_parts
from tests.crash.killing import WHEN

FLOWS = ["sequential", "concurrent", "fan_out", "catching", "retrying", "paying"]
STORES = ["local", "moto", pytest.param("ceph", marks=pytest.mark.ceph)]
SAMPLE = {"local": 6, "moto": 2, "ceph": 3}  # points a flow in CI


def points(kind: str, flow: str, operations: int) -> list[tuple[int, str]]:
    every = [(at, when) for at in range(1, operations + 1) for when in WHEN]
    if os.environ.get("KITARU_SWEEP") == "all":
        return every
    return sorted(random.Random(f"{kind} {flow}").sample(every, min(SAMPLE[kind], len(every))))


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", STORES)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_flow_killed_at_any_store_operation_completes_without_loss_or_repetition(
    flow: str, kind: str, new_case: Callable[..., Case], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = new_case(kind)
    leg = whole.start("run", flow=flow, at=10**9, when="before")
    expected = without_random_parts(leg.answer["result"])
    tally = Tally()
    for at, when in points(kind, flow, len(leg.operations)):
        case = new_case(kind)
        answer = crash_and_resume(case, flow, at, when, tally)
        if answer is not None:
            assert without_random_parts(answer["result"]) == expected, (at, when)
    with capsys.disabled():
        print(
            f"\n{flow} on {kind}: {tally.points} points tried, {tally.killed} killed, {tally.resumes} resumes, "
            f"{tally.lost} steps lost, {tally.repeated} steps repeated"
        )
    assert tally.lost == tally.repeated == 0


@pytest.mark.sweep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("when", WHEN)
def test_a_flow_killed_while_lineage_is_written_completes_with_each_step_once(when: str, new_case: Callable[..., Case]) -> None:
    tally = Tally()
    for at in (1, 2, 4):
        assert crash_and_resume(new_case(), "sequential", at, when, tally, recorder=True) is not None
    assert tally.killed


@pytest.mark.sweep
@pytest.mark.timeout(1200)
def test_a_resume_that_is_killed_itself_is_resumed(new_case: Callable[..., Case]) -> None:
    for at in range(1, 12, 2 if os.environ.get("KITARU_SWEEP") == "all" else 4):
        case = new_case()
        case.start("run", flow="concurrent", at=14, when="after").wait()
        assert case.run is not None
        stored = case.recorded()
        case.start("resume", run=case.run, at=at, when="after").wait()
        effects = case.effect_lines()
        answer = case.start("resume", run=case.run).answer
        assert answer.get("status") == "completed", answer
        assert not answer["problems"] and not answer["differences"]
        assert stored <= case.recorded() and not [e for e in case.effect_lines()[len(effects) :] if e[0] in stored]


@pytest.mark.sweep
def test_a_run_that_failed_is_tried_again_and_what_finished_is_kept(new_case: Callable[..., Case]) -> None:
    case = new_case()
    failed = case.start("run", flow="failing_once").answer
    assert failed["error"] == "OSError"
    case.effects.with_suffix(".mended").touch()
    answer: dict[str, Any] = case.start("resume", run=case.run).answer
    assert answer["status"] == "completed" and not answer["problems"] and not answer["differences"]
    assert [line[3] for line in case.effect_lines()] == ["before", "fails at first"]
