"""What a fork reuses, decided over records alone; and how two runs are compared. No ZenML, no I/O."""

from __future__ import annotations

import datetime as dt
from typing import Any

from kitaru_zenml.difference import difference
from kitaru_zenml.journal.journal import Snapshot
from kitaru_zenml.journal.records import Failure, JsonValue, Reused, StepRecord, Usage
from kitaru_zenml.selection import select

AT = dt.datetime(2026, 11, 24, tzinfo=dt.UTC)
FAILURE = Failure(type="builtins:ValueError", message="no")


def record(name: str, number: int, began: int = -1, *, inside: tuple[StepRecord, ...] = (), **fields: Any) -> StepRecord:
    scopes = tuple(scope for outer in inside[-1:] for scope in (*outer.scopes, outer.scope))
    around = scopes[-1].path if scopes else ""
    digest = fields.pop("digest", f"{name}{number}")
    values: dict[str, Any] = {
        "nonce": "n", "run_id": "one", "epoch": 1, "path": f"{around}/{name}@{digest}#.0", "name": name, "ordinal": 0, "number": number,
        "began": began, "digest": digest, "turn": ("", 0), "scopes": scopes, "outcome": JsonValue(data=f"{name} {number}"),
        "started_at": AT, "ended_at": AT + dt.timedelta(seconds=2),
    }  # fmt: skip
    if fields.get("failure"):
        values["outcome"] = None
    return StepRecord(**{**values, **fields})


def reused(records: list[StepRecord], *args: Any) -> set[str]:
    by_key = {r.object_key: r for r in records}
    return {by_key[key].name for key in select(by_key, *args).keys}


A, B, C, D = record("a", 0, 0), record("b", 1, 1), record("c", 2, 2), record("d", 3, 3)
FLOW = record("flow", 4, path="/")


def test_before_reuses_what_was_finished_when_the_cut_began() -> None:
    assert reused([A, B, C, D, FLOW], C, [], "before") == {"a", "b"}
    slow = record("slow", 3, 1)  # began when only `a` was finished
    assert reused([A, B, C, slow], slow, [], "before") == {"a"}


def test_without_a_step_to_run_from_the_first_override_is_the_cut() -> None:
    assert reused([A, B, C, D, FLOW], None, [D, B], "before") == {"a"}
    assert reused([A, B, C, D, FLOW], D, [B], "before") == {"a", "c"}


def test_with_neither_nothing_is_reused_or_all_that_succeeded() -> None:
    broken = record("broken", 5, 5, failure=FAILURE)
    assert reused([A, B, broken, FLOW], None, [], "before") == set()
    assert reused([A, B, broken, FLOW], None, [], "unchanged") == {"a", "b"}


def test_a_failure_before_the_cut_is_reused_and_a_later_one_is_not() -> None:
    early, late = record("early", 1, 1, failure=FAILURE), record("late", 3, 3, failure=FAILURE)
    assert reused([A, early, C, late], C, [], "unchanged") == {"a", "early"}
    assert reused([A, early, C, late], C, [], "before") == {"a", "early"}


def test_what_is_around_the_cut_and_inside_it_is_not_reused() -> None:
    outer = record("outer", 9, 1)
    cut = record("cut", 5, 3, inside=(outer,))
    deep, beside, later = (
        record("deep", 4, 3, inside=(cut,)),
        record("beside", 2, 2, inside=(outer,)),
        record("later", 6, 6, inside=(outer,)),
    )
    records = [A, outer, cut, deep, beside, later, record("after", 10, 10)]
    assert reused(records, cut, [], "before") == {"a", "beside"}
    assert reused(records, None, [cut], "unchanged") == {"a", "beside", "later", "after"}


def test_what_failed_inside_a_reused_step_belongs_to_it() -> None:
    outer = record("outer", 9, 1)
    caught = record("caught", 8, 7, inside=(outer,), failure=FAILURE)
    assert reused([A, outer, caught], A, [], "unchanged") == {"outer", "caught"}


def test_a_record_that_does_not_say_when_it_began_is_cut_by_its_own_number() -> None:
    assert reused([A, B, record("old", 2, -1), D], record("old", 2, -1), [], "before") == {"a", "b"}


# --- diff ----------------------------------------------------------------------------------------------------------------


def snapshot(*records: StepRecord, reused: set[str] = frozenset()) -> Snapshot:  # type: ignore[assignment]
    found = Snapshot(
        records={r.object_key: r for r in records}, hashes={r.object_key: f"{r.run_id} {r.number}" for r in records}
    )
    for r in records:
        if r.name in reused:
            found.reused[r.object_key] = Reused("one", found.hashes.pop(r.object_key))
    return found


def changes(first: Snapshot, second: Snapshot) -> dict[str, str]:
    found = difference(first, second, lambda r: r.outcome.data if isinstance(r.outcome, JsonValue) else None)
    return {step.step.partition("#")[0] if step.change != "changed" else step.step: step.change for step in found.steps}


def test_steps_are_reused_same_changed_overridden_new_or_gone() -> None:
    asked = record("e", 4, digest="before")
    first = snapshot(A, B, C, D, asked, record("z", 9))
    other = {"run_id": "two"}
    second = snapshot(
        A, record("b", 1, **other), record("c", 2, outcome=JsonValue(data="else"), metadata={"override": {}}, **other),
        record("d", 3, outcome=JsonValue(data={"x": 1}), **other), record("e", 7, digest="after", **other), record("y", 8, **other),
        reused={"a"},
    )  # fmt: skip
    assert changes(first, second) == {
        "a": "reused", "b": "same", "c": "overridden", "d#0": "changed", "e#0": "changed", "y": "new", "z": "gone",
    }  # fmt: skip


def test_a_diff_reads_line_by_line() -> None:
    first = record("d", 3, outcome=JsonValue(data={"a": 1, "b": [1, 2]}))
    second = record("d", 3, outcome=JsonValue(data={"b": [1, 3], "a": 1}), run_id="two")
    found = difference(snapshot(first), snapshot(second), lambda r: r.outcome.data)  # type: ignore[union-attr]
    assert [line for line in found.steps[0].diff[2:] if line[0] in "+-"] == ["-    2", "+    3"]


def test_steps_inside_a_step_with_other_inputs_are_paired_by_their_place() -> None:
    def run(digest: str, run_id: str) -> Snapshot:
        outer = record("agent", 5, digest=digest, run_id=run_id)
        inner = [
            record("look", n, inside=(outer,), ordinal=n, turn=("", n), digest=f"same {n}", run_id=run_id) for n in range(2)
        ]
        return snapshot(outer, *inner)

    found = difference(run("x", "one"), run("y", "two"), lambda r: None)
    assert [(s.step, s.change) for s in found.steps] == [
        ("agent#0/look#0", "same"), ("agent#0/look#1", "same"), ("agent#0", "changed"),
    ]  # fmt: skip


def test_totals_count_what_a_run_spent_itself() -> None:
    usage = Usage(model="m", input_tokens=10, output_tokens=5, cost=0.5)
    first = snapshot(record("a", 0, usage=usage), record("b", 1, usage=usage))
    second = snapshot(record("a", 0, usage=usage), record("b", 1, usage=usage, run_id="two"), reused={"a"})
    found = difference(first, second, lambda r: None)
    assert (found.first.tokens, found.first.cost, found.first.seconds) == (30, 1.0, 4.0)
    assert (found.second.tokens, found.second.cost, found.second.reused, found.second.seconds) == (15, 0.5, 1, 2.0)
