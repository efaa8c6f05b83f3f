"""Waits, timers, events, cancellation and child runs through real ZenML: what is stored, shown and answered, and what runs how often."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from zenml.client import Client

from kitaru_zenml import (
    AlreadyAnswered,
    ChildRunFailed,
    InvalidAnswer,
    RunCancelled,
    RunHandle,
    RunSuspended,
    client,
    conditions,
    resume,
)
from kitaru_zenml.errors import NoSuchWait, RunIdTaken
from kitaru_zenml.journal.inbox import put_answer
from kitaru_zenml.journal.records import Answer
from kitaru_zenml.runs import find_run, open_journal
from tests import flows_waiting as flows


@pytest.fixture(autouse=True)
def effects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "effects"
    path.touch()
    monkeypatch.setenv("EFFECTS", str(path))
    return path


def lines(effects: Path) -> list[str]:
    return effects.read_text().splitlines()


def is_free(run_id: str) -> bool:
    journal = open_journal(find_run(run_id))
    beat = journal.beat(journal.leases()[-1].epoch)
    return beat is not None and beat.released


def test_a_run_suspends_on_a_question_and_goes_on_with_the_answer(effects: Path) -> None:
    handle = flows.asking.run(4)
    assert handle.status == "paused" and is_free(handle.id)
    with pytest.raises(RunSuspended, match="approve#0"):
        handle.result()
    [question] = client.waits(handle.id)
    assert (question.flow, question.wait, question.question) == ("asking", "approve#0", "Spend 5?")
    assert question.json_schema is not None and question.metadata == {"amount": 5}
    with pytest.raises(InvalidAnswer, match="less than or equal to 100"):
        client.answer(handle.id, {"ok": True, "limit": 101})
    assert client.waits(handle.id) == [question]
    client.answer(handle.id, flows.Decision(ok=True), by="ann")
    assert client.answer(handle.id, {"ok": True, "limit": 0}).by == "ann"
    with pytest.raises(AlreadyAnswered, match="by ann"):
        client.answer(handle.id, {"ok": False})
    assert resume(handle.id).result() == "spent 5"
    assert lines(effects) == ["prepare 4", "spend 5"]
    record = next(r for r in open_journal(handle.run).load().records.values() if r.kind == "wait")
    assert record.metadata["answered_by"] == "ann" and record.metadata["via"] == "client"
    with pytest.raises(AlreadyAnswered):
        client.answer(handle.id, {"ok": False}, wait="approve")
    steps = {step.name: step for step in Client().list_run_steps(pipeline_run_id=handle.id, size=50, hydrate=True).items}
    assert set(steps) == {"prepare#0", "approve#0", "spend#0"}
    assert steps["approve#0"].output.load() == flows.Decision(ok=True)


def test_zenml_shows_the_question_and_its_answer_is_the_runs(effects: Path) -> None:
    handle = flows.asking.run(1)
    condition = conditions.pending(handle.id)
    assert condition is not None and condition.question == "Spend 2?" and condition.data_schema is not None
    Client().resolve_run_wait_condition(condition.id, resolution="continue", result={"ok": False})
    assert resume(handle.id).result() == "kept"
    record = next(r for r in open_journal(handle.run).load().records.values() if r.kind == "wait")
    assert record.metadata["via"] == "zenml" and record.metadata["answered_by"] == Client().active_user.name


def test_zenmls_command_line_answers() -> None:
    handle = flows.asking.run(1)
    condition = conditions.pending(handle.id)
    assert condition is not None
    zenml = [sys.executable, "-c", "from zenml.cli.cli import cli; cli()", "pipeline", "runs", "wait-conditions"]
    resolving = ["resolve", str(condition.id), "--resolution", "continue", "--result", '{"ok": true}']
    said = subprocess.run([*zenml, *resolving], capture_output=True, text=True, timeout=120)
    assert said.returncode == 0, said.stdout + said.stderr
    assert resume(handle.id).result() == "spent 2"


def test_an_answer_that_only_pydantic_refuses_keeps_the_wait_open_and_is_asked_again_in_zenml() -> None:
    handle = flows.asking.run(1)
    condition = conditions.pending(handle.id)
    assert condition is not None
    Client().resolve_run_wait_condition(condition.id, resolution="continue", result={"ok": True, "limit": 7})
    assert resume(handle.id).status == "paused"
    [question] = client.waits(handle.id)
    assert question.refused is not None and "must be even" in question.refused
    shown = conditions.pending(handle.id)
    assert shown is not None and shown.name == "approve#0 (2)" and "must be even" in (shown.question or "")
    Client().resolve_run_wait_condition(shown.id, resolution="continue", result={"ok": True, "limit": 8})
    assert resume(handle.id).result() == "spent 2"


def test_an_answer_past_zenml_that_is_refused_leaves_the_condition_to_the_next() -> None:
    handle = flows.asking.run(1)
    journal = open_journal(handle.run)
    [wait] = journal.open_waits()
    put_answer(
        journal, Answer(nonce="n", run_id=handle.id, wait=wait.key, value={"ok": "perhaps"}, by="bob", at=datetime.now(UTC))
    )
    assert resume(handle.id).status == "paused"
    shown = conditions.pending(handle.id)
    assert shown is not None and shown.name == "approve#0"
    Client().resolve_run_wait_condition(shown.id, resolution="continue", result={"ok": True})
    assert resume(handle.id).result() == "spent 2"


def test_several_questions_are_open_at_once_and_answered_in_any_order(effects: Path) -> None:
    handle = flows.asking_in_branches.run(3)
    assert sorted(q.wait for q in client.waits(handle.id)) == [f"refund#{i}/approve#0" for i in range(3)]
    with pytest.raises(NoSuchWait, match="refund#2/approve#0"):
        client.answer(handle.id, "yes")
    client.answer(handle.id, "no", wait="refund#2/approve#0")
    client.answer(handle.id, "yes", wait="refund#0/approve#0")
    assert resume(handle.id).status == "paused"
    shown = conditions.pending(handle.id)
    assert shown is not None and shown.name == "refund#1/approve#0"
    Client().resolve_run_wait_condition(shown.id, resolution="continue", result="yes")
    assert resume(handle.id).result() == ["1:yes", "2:yes", "3:no"]
    done = lines(effects)
    assert sorted(done) == sorted([f"prepare {i}" for i in range(3)] + ["refund 0 yes", "refund 1 yes", "refund 2 no"])


def test_an_answer_in_zenml_is_taken_also_by_a_leg_that_asks_another_question_first() -> None:
    handle = flows.asking_in_another_order.run()
    shown = conditions.pending(handle.id)
    assert shown is not None and shown.name == "left#0"
    Client().resolve_run_wait_condition(shown.id, resolution="continue", result="yes")
    assert resume(handle.id).status == "paused"
    assert [q.wait for q in client.waits(handle.id)] == ["right#0"]
    client.answer(handle.id, "no")
    assert resume(handle.id).result() == ["yes", "no"]


def test_waits_inside_running_steps_replay_what_the_step_did_before(effects: Path) -> None:
    handle = flows.asking_in_steps.run()
    client.answer(handle.id, [7], wait="ask_in_step#1/right#0")
    resume(handle.id)
    client.answer(handle.id, [5], wait="left")
    assert resume(handle.id).result() == [[2, 5], [2, 7]]
    assert sorted(lines(effects)) == ["after left", "after right", "prepare 1", "prepare 1"]


def test_an_answer_reaches_a_leg_that_is_still_there() -> None:
    patient = flows.asking.with_options(grace=30.0)
    handle = patient.submit(1)
    deadline = time.monotonic() + 20
    while (condition := conditions.pending(handle.id)) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert condition is not None
    Client().resolve_run_wait_condition(condition.id, resolution="continue", result={"ok": True})
    assert handle.result(timeout=20) == "spent 2"
    assert len(open_journal(handle.run).leases()) == 1


def test_a_gate_takes_no_value() -> None:
    handle = flows.gate.run()
    with pytest.raises(InvalidAnswer, match="takes no value"):
        client.answer(handle.id, 1)
    client.answer(handle.id)
    assert resume(handle.id).result() == "gone"


@pytest.mark.parametrize(("default", "result"), [(True, "nobody"), (False, "timed out")])
def test_a_wait_times_out_by_its_stored_deadline(default: bool, result: str) -> None:
    handle = flows.asking_with_timeout.run(1.5, default)
    assert handle.status == "paused"
    [question] = client.waits(handle.id)
    assert question.deadline is not None
    time.sleep(max(0.0, (question.deadline - datetime.now(UTC)).total_seconds()))
    assert resume(handle.id).result() == result
    assert conditions.pending(handle.id) is None


def test_a_late_answer_counts_until_the_run_has_timed_out() -> None:
    slow, late = (flows.asking_with_timeout.run(2.0, True) for _ in range(2))
    time.sleep(2.1)
    client.answer(late.id, "just in time")
    assert resume(late.id).result() == "just in time"
    assert resume(slow.id).result() == "nobody"
    with pytest.raises(NoSuchWait):
        client.answer(slow.id, "too late")


def test_an_answer_in_zenml_while_the_run_suspends_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    close, answered = conditions.Conditions.close, list[str]()

    def answered_meanwhile(board: conditions.Conditions, *, suspending: bool) -> bool:
        if suspending and not answered and (shown := conditions.pending(board._run.id)) is not None:
            answered.append(shown.name)
            Client().resolve_run_wait_condition(shown.id, resolution="continue", result={"ok": True})
        return close(board, suspending=suspending)

    monkeypatch.setattr(conditions.Conditions, "close", answered_meanwhile)
    handle = flows.asking.with_options(grace=2.0).run(1)
    assert answered == ["approve#0"] and handle.result() == "spent 2"


def test_of_the_dashboard_and_the_command_line_the_first_in_zenml_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    handle, resolve = flows.asking.run(1), conditions.resolve

    def too_late(condition: Any, value: Any) -> Any:
        Client().resolve_run_wait_condition(condition.id, resolution="continue", result={"ok": False})
        return resolve(condition, value)

    monkeypatch.setattr(conditions, "resolve", too_late)
    with pytest.raises(AlreadyAnswered):
        client.answer(handle.id, {"ok": True})
    assert resume(handle.id).result() == "kept"


def test_an_abort_in_zenml_stops_the_run() -> None:
    handle = flows.undoable.run(1)
    condition = conditions.pending(handle.id)
    assert condition is not None
    Client().resolve_run_wait_condition(condition.id, resolution="abort")
    assert handle.status == "stopped"
    assert client.waits() == [] or handle.id not in {q.run_id for q in client.waits()}


def test_a_long_sleep_suspends_and_its_deadline_stands() -> None:
    handle = flows.napping.run(1.2)
    assert handle.status == "paused" and client.waits(handle.id) == []
    [timer] = open_journal(handle.run).open_waits()
    resume(handle.id)
    [again] = open_journal(handle.run).open_waits()
    assert timer.deadline is not None and again == timer
    time.sleep(max(0.0, (timer.deadline - datetime.now(UTC)).total_seconds()))
    assert resume(handle.id).result() == "rested"


def test_a_short_sleep_waits_in_the_process() -> None:
    handle = flows.napping.with_options(grace=5.0).run(0.2)
    assert handle.result() == "rested" and len(open_journal(handle.run).leases()) == 1


def test_events_reach_the_flow_in_order_and_once(effects: Path) -> None:
    handle = flows.listening.run(4)
    assert handle.status == "paused"
    with client.EventSender(handle.id) as sender:
        for i in range(3):
            sender.send("orders", {"id": i}, idempotency_key=f"k{i % 2}")  # the third is the first again
    assert resume(handle.id).status == "paused"
    client.send_event(handle.id, "orders", "c")
    client.send_event(handle.id, "orders", "d")
    assert resume(handle.id).result() == [{"id": 0}, {"id": 1}, "c", "d"]
    assert len(lines(effects)) == 4


def test_an_async_flow_iterates_over_events() -> None:
    handle = flows.listening_async.run()
    for payload in (1, "two", "close"):
        client.send_event(handle.id, "orders", payload)
    assert resume(handle.id).result() == [1, "two"]


# --- cancel --------------------------------------------------------------------------------------------------------------


def test_cancelling_a_suspended_run_runs_its_hook_and_stops_it(effects: Path) -> None:
    handle = flows.undoable.run(3)
    assert client.cancel(handle.id, "changed my mind") == "stopped"
    assert lines(effects) == ["prepare 3", "undo 3 changed my mind"]
    assert "on_cancel#0" in {s.name for s in Client().list_run_steps(pipeline_run_id=handle.id).items}
    assert conditions.pending(handle.id) is None and client.waits(handle.id) == []


def test_cancelling_a_running_run_stops_it_at_its_next_boundary(effects: Path) -> None:
    ended: list[BaseException] = []

    def run() -> None:
        try:
            flows.undoable.with_options(grace=60.0).run(9)
        except RunCancelled as error:
            ended.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 20
    while not lines(effects) and time.monotonic() < deadline:
        time.sleep(0.05)
    run_id = str(Client().list_pipeline_runs(pipeline="undoable", sort_by="desc:created", size=1).items[0].id)
    assert client.cancel(run_id, "stop") == "stopped"
    thread.join(20)
    assert len(ended) == 1 and lines(effects)[-1] == "undo 9 stop"


def test_cancelling_a_parent_stops_its_children_too() -> None:
    handle = flows.parent.run(2, ask=True)
    ids = children_of(handle.id)
    assert client.cancel(handle.id) == "stopped"
    assert {RunHandle(id).status for id in ids} == {"stopped"}


def test_cancelling_a_parent_stops_the_children_that_have_not_begun(effects: Path) -> None:
    handle = flows.queueing.submit(3)
    deadline = time.monotonic() + 60
    while len(started := children_of(handle.id)) < 3 or not lines(effects):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    client.request_cancel(handle.id, "enough")
    while sum(RunHandle(id).status == "stopped" for id in started) < 2:
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    Path(f"{effects}.told").touch()
    while not handle.run.status.is_finished:
        assert time.monotonic() < deadline + 60
        time.sleep(0.2)
    assert handle.status == "stopped" and {RunHandle(id).status for id in started} == {"stopped"}
    assert lines(effects) == ["slow 0"], "a child that was queued began after all"


def test_a_fork_that_is_cancelled_leaves_its_origins_children_alone() -> None:
    origin = flows.parent.run(1, ask=True)
    [child] = children_of(origin.id)
    with pytest.raises(NoSuchWait):
        client.answer(origin.id, 1)
    fork = flows.parent.replay(origin.id, reuse="unchanged")
    assert fork.status == "paused" and client.cancel(fork.id) == "stopped"
    assert RunHandle(child).status == "paused"


def children_of(run_id: str) -> list[str]:
    records = open_journal(find_run(run_id)).load().records.values()
    return [r.outcome.data["run"] for r in records if r.kind == "run"]  # type: ignore[union-attr]


def test_children_can_be_kept() -> None:
    handle = flows.parent.run(1, ask=True)
    [child] = children_of(handle.id)
    assert client.cancel(handle.id, keep_children=True) == "stopped"
    assert RunHandle(child).status == "paused"


@pytest.mark.parametrize(("how", "error"), [("ctrl-c", KeyboardInterrupt), ("a bug", ValueError)])
def test_a_run_that_ended_beside_an_open_question_is_resumed_and_the_question_still_stands(
    how: str, error: type[BaseException], effects: Path
) -> None:
    with pytest.raises(error) as caught:
        flows.broken.run(how)
    run_id = caught.value.__notes__[0].split()[1]
    assert RunHandle(run_id).status == "failed"
    assert conditions.pending(run_id) is not None
    Path(f"{effects}.mended").touch()
    client.answer(run_id, "fine")
    assert resume(run_id).result() == "fine"


# --- children ------------------------------------------------------------------------------------------------------------


def test_a_parent_joins_its_children(effects: Path) -> None:
    handle = flows.parent.run(6)
    assert handle.result() == sum(i * i for i in range(6))
    assert sorted(lines(effects)) == [f"child {i}" for i in range(6)]
    assert flows.parent_async.run(2).result() == 0 + 1 + 4


def test_a_parent_suspends_until_its_children_have_ended() -> None:
    handle = flows.parent.run(2, ask=True)
    assert handle.status == "paused" and is_free(handle.id)
    questions = [q for q in client.waits() if q.flow == "child"]
    for question in questions[-2:]:
        client.answer(question.run_id, wait=question.wait)
        resume(question.run_id)
    assert resume(handle.id).result() == 1


def test_a_failed_child_fails_the_join_until_it_is_mended(effects: Path) -> None:
    with pytest.raises(ChildRunFailed, match="unlucky") as caught:
        flows.unlucky.run(False)
    parent_id = caught.value.__notes__[0].split()[1]
    assert flows.unlucky.run(True).result()[0] == "144"
    Path(f"{effects}.mended").touch()
    assert resume(caught.value.run_id).result() == 169
    assert resume(parent_id).result() == ["144", "169"]


def test_a_run_with_an_id_of_ones_own_is_started_once(effects: Path) -> None:
    first = flows.child.run(3, id="ticket-42")
    second = flows.child.run(3, id="ticket-42")
    assert first.id == second.id and second.result() == 9 and lines(effects) == ["child 3"]
    with pytest.raises(RunIdTaken, match="ticket-42"):
        flows.child.run(4, id="ticket-42")
    with pytest.raises(ValueError, match="unlucky"):
        flows.child.run(13, id="ticket-13")
    Path(f"{effects}.mended").touch()
    assert flows.child.run(13, id="ticket-13").result() == 169
