"""The decision, case by case, and what stands beside it: hints, limits, settings."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from zenml.enums import ExecutionStatus

from kitaru_zenml.cli.main import main
from kitaru_zenml.errors import InvalidWorkerSettings
from kitaru_zenml.journal.due import leave_hint
from kitaru_zenml.journal.lease import this_process
from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml.journal.records import DUE_FOLDER, Beat, Lease, LegClosedEvent, OpenWait, Scope
from kitaru_zenml.limits import Limits
from kitaru_zenml.worker.agenda import Agenda
from kitaru_zenml.worker.needs import Asked, Facts, GiveUp, Later, Leave, Moment, Start, decide
from kitaru_zenml.worker.settings import Settings, read_settings

AT = datetime(2026, 11, 24, 5, 0, tzinfo=UTC)
S = ExecutionStatus


def lease(**more: Any) -> Lease:
    told: dict[str, Any] = {"nonce": "n", "run_id": "r", "epoch": 3, "holder": this_process(), "purpose": "resume"}
    return Lease(**{**told, "lapse_seconds": 30, "taken_at": AT, **more})


def close(status: Any, **more: Any) -> LegClosedEvent:
    return LegClosedEvent(nonce="n", run_id="r", epoch=3, at=AT, status=status, covers={}, previous_root="", root="", **more)


def waiting(kind: Any, **more: Any) -> OpenWait:
    scope = Scope(path=f"/{kind}", name=kind, ordinal=0, digest="d", turn=("", 0))
    return OpenWait(nonce="n", run_id="r", epoch=3, kind=kind, scope=scope, asked_at=AT, **more)


RELEASED = Beat(epoch=3, count=5, at=AT, released=True)
BEATING = Beat(epoch=3, count=5, at=AT)
WAIT = waiting("wait")


def suspended(*waits: OpenWait, **more: Any) -> Facts:
    return Facts(lease(), RELEASED, close("paused", suspended_on=tuple(w.key for w in waits)), waits=waits, **more)


ALIVE = Facts(lease(), BEATING)
DEAD = Facts(lease(), BEATING, gone=True)
CASES: dict[str, tuple[Facts, ExecutionStatus, float, type, str]] = {
    "alive": (ALIVE, S.RUNNING, 10, Later, "executed by"),
    "alive, whatever came": (Facts(lease(), BEATING, cancelled=True), S.RUNNING, 0, Later, "executed by"),
    "lapsed": (ALIVE, S.RUNNING, 31, Start, "has not beaten for 30 s"),
    "gone": (DEAD, S.RUNNING, 0, Start, "is gone"),
    "gone after its end": (DEAD, S.COMPLETED, 0, Leave, "completed"),
    "failed": (Facts(lease(), RELEASED, close("failed")), S.FAILED, 0, Leave, "failed"),
    "failed, not shown": (Facts(lease(), RELEASED, close("failed")), S.RUNNING, 0, GiveUp, "ZenML does not show"),
    "failed, gone, not shown": (Facts(lease(), BEATING, close("failed"), gone=True), S.RUNNING, 0, GiveUp, "does not show"),
    "failed, to be cancelled": (Facts(lease(), RELEASED, cancelled=True), S.FAILED, 0, Start, "cancelled"),
    "waits": (suspended(WAIT), S.PAUSED, 0, Leave, "waits for wait#0"),
    "answered": (suspended(WAIT, answered=frozenset({WAIT.key})), S.PAUSED, 0, Start, "answered"),
    "to be cancelled": (suspended(WAIT, cancelled=True), S.PAUSED, 0, Start, "cancelled"),
    "timer to come": (suspended(waiting("timer", deadline=AT + timedelta(hours=1))), S.PAUSED, 0, Later, "waits for timer#0"),
    "timer due": (suspended(waiting("timer", deadline=AT)), S.PAUSED, 0, Start, "due"),
    "timed out": (suspended(waiting("wait", deadline=AT)), S.PAUSED, 0, Start, "timed out"),
    "event": (suspended(waiting("event", event="e"), inbox=1), S.PAUSED, 0, Start, "news"),
    "news for nobody": (suspended(WAIT, inbox=1), S.PAUSED, 0, Leave, "waits"),
    "children run": (suspended(waiting("join", runs=("a", "b"))), S.PAUSED, 0, Leave, "waits"),
    "children ended": (suspended(waiting("join", runs=("a",))), S.PAUSED, 0, Start, "child runs have ended"),
    "pauses for nothing": (Facts(lease(), RELEASED), S.PAUSED, 0, Start, "waits for nothing"),
    "resumed by the server": (suspended(WAIT), S.RESUMING, 0, Later, "started elsewhere"),
    "not resumed after all": (suspended(WAIT), S.RESUMING, 601, Start, "was not"),
    "handed to an orchestrator": (Facts(lease(), RELEASED), S.RESUMING, 5, Later, "started elsewhere"),
    "interrupted": (Facts(lease(), RELEASED, close("stopped")), S.RUNNING, 0, Start, "let it go"),
    "begins": (Facts(), S.INITIALIZING, 1, Later, "about to begin"),
    "never began": (Facts(), S.INITIALIZING, 16, Start, "nobody began it"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_run_needs(case: str) -> None:
    facts, status, unchanged, kind, why = CASES[case]
    ask = Asked(unfinished=lambda ids: set(ids) & {"b"})
    decision = decide(facts, status, Moment(unchanged, AT), ask, 5)
    assert isinstance(decision, kind) and why in decision.why, decision


def test_a_lapsed_lease_is_taken_over_only_as_it_was_seen() -> None:
    decision = decide(ALIVE, S.RUNNING, Moment(31, AT), Asked(), 5)
    assert isinstance(decision, Start) and decision.watched == (3, 5)


@pytest.mark.parametrize(
    ("crashes", "after", "kind"), [(1, 0.5, Later), (1, 1.0, Start), (3, 3.9, Later), (3, 4.1, Start), (5, 0, GiveUp)]
)
def test_crashes_wait_longer_and_longer(crashes: int, after: float, kind: type) -> None:
    assert isinstance(decide(DEAD, S.RUNNING, Moment(after, AT), Asked(lambda: crashes), 5), kind)


def test_a_remote_orchestrator_begins_its_runs_itself() -> None:
    assert isinstance(decide(Facts(), S.INITIALIZING, Moment(600, AT), Asked(begins_here=lambda: False), 5), Leave)


# --- hints ---


@pytest.fixture
def local(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path))


def hints_of(store: LocalStore) -> list[str]:
    return store.list(DUE_FOLDER)


def test_hints_are_due_in_order_and_once_a_run(local: LocalStore) -> None:
    now = datetime.now(UTC)
    for run, seconds in (("b", -5), ("a", -9), ("b", -1), ("c", 60)):
        leave_hint(local, run, now + timedelta(seconds=seconds))
    agenda = Agenda(local, 0.1)
    agenda.read()
    assert agenda.due() == ["a", "b"] and len(agenda) == 4
    agenda.drop("b")
    assert agenda.due() == ["a"] and len(hints_of(local)) == 2


def test_putting_off_by_many_workers_does_not_multiply_hints(local: LocalStore) -> None:
    leave_hint(local, "a", datetime.now(UTC) - timedelta(seconds=1))
    agendas = [Agenda(local, 0.1) for _ in range(4)]
    for _ in range(3):
        for agenda in agendas:
            agenda.read()
        for agenda in agendas:
            agenda.put_off("a", datetime.now(UTC) + timedelta(seconds=30))
    assert 1 <= len(hints_of(local)) <= 2, "they round it to the same second"


def test_a_hint_left_meanwhile_is_not_removed(local: LocalStore) -> None:
    leave_hint(local, "a", datetime.now(UTC) - timedelta(seconds=1))
    agenda = Agenda(local, 0.1)
    agenda.read()
    leave_hint(local, "a", datetime.now(UTC))
    agenda.drop("a")
    assert len(hints_of(local)) == 1


def test_a_hint_of_an_unknown_run_is_kept_for_a_week(local: LocalStore) -> None:
    leave_hint(local, "a", datetime.now(UTC) - timedelta(days=1))
    leave_hint(local, "b", datetime.now(UTC) - timedelta(days=8))
    agenda = Agenda(local, 0.1)
    agenda.read()
    assert agenda.unknown("a") and not agenda.unknown("b")
    assert len(hints_of(local)) == 1


# --- limits and settings ---


def test_slots_are_freed_and_never_more_than_there_are(tmp_path: Path) -> None:
    limits = Limits(tmp_path, {"provider": 2})
    assert limits.binds("provider") and not limits.binds("gpu") and not limits.binds(None)
    slots = [limits.try_slot("provider") for _ in range(2)]
    assert all(slots) and limits.try_slot("provider") is None
    assert slots[0] is not None
    slots[0].release()
    slots[0].release()
    assert limits.try_slot("provider") is not None


def test_settings_come_from_a_file_and_the_command_line_counts_more(tmp_path: Path) -> None:
    file = tmp_path / "worker.toml"
    file.write_text('concurrency = 8\nstacks = ["a"]\n[limits]\ngpu = 1\nprovider = 4\n')
    settings = read_settings(file, {"concurrency": 2, "limits": {"gpu": 3}})
    assert settings == Settings(concurrency=2, stacks=("a",), limits={"gpu": 3, "provider": 4})


@pytest.mark.parametrize(
    ("text", "said"),
    [("concurency = 1", "concurency"), ("concurrency = 0", "1 or more"), ("x = ", "cannot be read"), ('log_format = "xml"', "xml"),
     ('concurrency = "many"', "concurrency"), ("[limits]\ngpu = 'one'", "limits")],
)  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "worker.toml"
    file.write_text(text)
    with pytest.raises(InvalidWorkerSettings, match=said):
        read_settings(file, {})


def test_wrong_settings_are_said_before_anything_starts(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["worker", "--concurrency", "0"])
    assert done.exit_code == 1 and "1 or more" in done.stderr
    assert CliRunner().invoke(main, ["worker", "--limit", "gpu"]).exit_code == 2
    assert "cannot be read" in CliRunner().invoke(main, ["worker", "--config", str(tmp_path / "none.toml")]).stderr
