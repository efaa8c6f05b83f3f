"""What differs between two runs, step by step: pure, over their journals as read.

Steps are paired by their path (the same call at the same place), else by their turn in the paired scope (the same place, other inputs),
else by their name for people. What is left is gone or new.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kitaru_zenml.journal.journal import Snapshot
from kitaru_zenml.journal.records import StepRecord
from kitaru_zenml.lineage.html import spoken

Change = Literal["reused", "same", "overridden", "changed", "new", "gone"]
LONGEST = 400  # lines of an output that are compared


@dataclass(frozen=True)
class StepChange:
    """How a step of the first run went in the second.

    Attributes:
        step: Its name, in the second run if it is there.
        change: `reused` is the same record, `same` ran again with the same outcome.
        first: Its record in the first run.
        second: Its record in the second run.
        inputs_differ: Whether it was asked with other inputs.
        diff: Unified diff of the outcomes, if they differ.
    """

    step: str
    change: Change
    first: StepRecord | None = None
    second: StepRecord | None = None
    inputs_differ: bool = False
    diff: tuple[str, ...] = ()


@dataclass
class Totals:
    """What a run spent itself: what it reuses was spent elsewhere. Seconds are those of the outermost steps, cost is in US dollars."""

    steps: int = 0
    reused: int = 0
    seconds: float = 0.0
    tokens: int = 0
    cost: float | None = None


@dataclass
class Difference:
    """Two runs compared."""

    steps: list[StepChange] = field(default_factory=list)
    first: Totals = field(default_factory=Totals)
    second: Totals = field(default_factory=Totals)

    @property
    def counts(self) -> dict[str, int]:
        """How many steps changed in which way."""
        found: dict[str, int] = {}
        for step in self.steps:
            found[step.change] = found.get(step.change, 0) + 1
        return found


def difference(first: Snapshot, second: Snapshot, tree_of: Callable[[StepRecord], Any]) -> Difference:
    """Compare two runs.

    Args:
        first: The journal of one.
        second: The journal of the other.
        tree_of: The JSON tree of a record's outcome.
    """
    before, after = _steps(first), _steps(second)
    found = Difference(first=_totals(first, before), second=_totals(second, after))
    for one, other in _paired(before, after):
        found.steps.append(_compared(one, other, first, second, tree_of))
    return found


def _steps(snapshot: Snapshot) -> list[StepRecord]:
    """The steps of a run, each after what is around it."""
    idle = snapshot.untaken if snapshot.last_close is not None else snapshot.not_asked_for()
    records = [r for r in snapshot.current().values() if r.path != "/" and r.object_key not in idle]
    return sorted(records, key=lambda r: (len(r.scopes), r.number))


def _paired(before: list[StepRecord], after: list[StepRecord]) -> Iterator[tuple[StepRecord | None, StepRecord | None]]:
    """Pairs in the order of the second run; what is gone stands at the end."""
    scopes = {"": ""}  # path of a scope in the second run -> its path in the first
    left = {record.path: record for record in before}
    pairs: list[tuple[StepRecord | None, StepRecord | None]] = []
    by_place: dict[tuple[Any, ...], list[StepRecord]] = {}
    for record in before:
        for place in _places(record, _scope(record)):
            by_place.setdefault(place, []).append(record)
    exact = {record.path for record in after} & left.keys()
    for other in after:
        one = left.pop(other.path, None)
        around = scopes.get(_scope(other), _scope(other))
        if one is None:
            candidates = (r for place in _places(other, around) for r in by_place.get(place, ()))
            one = next((r for r in candidates if r.path in left and r.path not in exact), None)
            if one is not None:
                del left[one.path]
        if one is not None:
            scopes[other.path] = one.path
            for theirs, ours in zip(other.scopes, one.scopes, strict=False):
                scopes.setdefault(theirs.path, ours.path)
        pairs.append((one, other))
    pairs.sort(key=lambda pair: pair[1].number if pair[1] else -1)
    yield from pairs
    yield from ((record, None) for record in sorted(left.values(), key=lambda r: r.number))


def _scope(record: StepRecord) -> str:
    return record.scopes[-1].path if record.scopes else ""


def _places(record: StepRecord, scope: str) -> Iterable[tuple[Any, ...]]:
    """What identifies the place of a step in a scope, the surest first."""
    if record.key is not None:
        return ((scope, record.name, "key", record.key),)
    return ((scope, record.name, record.turn), (scope, record.name, record.ordinal), ("named", record.display))


def _compared(
    one: StepRecord | None, other: StepRecord | None, first: Snapshot, second: Snapshot, tree_of: Callable[[StepRecord], Any]
) -> StepChange:
    if one is None or other is None:
        record = other or one
        assert record is not None
        return StepChange(record.display, "new" if one is None else "gone", one, other)
    inputs_differ = one.digest != other.digest
    if _hash(first, one) == _hash(second, other):
        return StepChange(other.display, "reused", one, other)
    lines = _lines(one, tree_of), _lines(other, tree_of)
    diff = tuple(difflib.unified_diff(*lines, "first", "second", lineterm="", n=2)) if lines[0] != lines[1] else ()
    if "override" in other.metadata:
        return StepChange(other.display, "overridden", one, other, inputs_differ, diff)
    return StepChange(other.display, "changed" if diff or inputs_differ else "same", one, other, inputs_differ, diff)


def _hash(snapshot: Snapshot, record: StepRecord) -> str:
    key = record.object_key
    return snapshot.reused[key].sha256 if key in snapshot.reused else snapshot.hashes[key]


def _lines(record: StepRecord, tree_of: Callable[[StepRecord], Any]) -> list[str]:
    """An outcome as text to be compared: what a model said, text as it is, all else as JSON with sorted keys."""
    if record.failure is not None:
        return [f"{record.failure.type.rpartition(':')[2]}: {line}" for line in record.failure.message.splitlines() or [""]]
    text = _as_text(record, tree_of(record))
    lines = text.splitlines() or [""]
    return (
        lines
        if len(lines) <= LONGEST
        else [
            *lines[:LONGEST],
            f"... {len(lines) - LONGEST} lines more, {hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:10]}",
        ]
    )


def _as_text(record: StepRecord, tree: Any) -> str:
    if record.kind == "model":
        return spoken(tree)
    return tree if isinstance(tree, str) else json.dumps(tree, indent=2, sort_keys=True, ensure_ascii=False, default=str)


def _totals(snapshot: Snapshot, records: list[StepRecord]) -> Totals:
    totals = Totals(steps=len(records))
    for record in records:
        if record.object_key in snapshot.reused:
            totals.reused += 1
            continue
        if not record.scopes:
            totals.seconds += (record.ended_at - record.started_at).total_seconds()
        if record.usage is not None:
            totals.tokens += record.usage.input_tokens + record.usage.output_tokens
            if record.usage.cost is not None:
                totals.cost = (totals.cost or 0.0) + record.usage.cost
    return totals
