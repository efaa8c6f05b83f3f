"""Verify a run end to end: recompute every hash, every digest and every root, and say what does not fit.

Three things are no alarm and are said as notes: a leg that was killed closed nothing; its records are covered by a later leg; and a record
that a superseded executor stored after the run went on elsewhere is late: nobody asked for it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from kitaru_zenml.codec import value_tree
from kitaru_zenml.errors import CorruptRecord, JournalGap, KitaruError
from kitaru_zenml.inputs import digest_tree, resolve_inputs
from kitaru_zenml.journal.journal import Journal, Snapshot
from kitaru_zenml.journal.records import BlobValue, LegClosedEvent, PickledValue, StepRecord, chain_root


@dataclass
class Verification:
    """What was found."""

    run_id: str
    records: int = 0
    covered: int = 0
    legs: int = 0
    root: str = ""
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing was changed or lost."""
        return not self.problems


def verify(journal: Journal, noted_root: str | None = None) -> Verification:
    """Recompute the whole journal of a run.

    Args:
        journal: Of the run.
        noted_root: The last root according to ZenML's run metadata, if it has one.
    """
    found = Verification(journal.run_id)
    try:
        snapshot = journal.load(on_corrupt=lambda error: found.problems.append(f"`{error.name}` is corrupt: {error.reason}"))
    except JournalGap as gap:
        found.problems.append(str(gap))
        return found
    found.records = len(snapshot.records)
    _roots(snapshot, found, noted_root)
    _legs(journal, snapshot, found)
    for key, record in sorted(snapshot.records.items(), key=lambda item: item[1].number):
        _record(journal, snapshot, key, record, found)
    return found


def _roots(snapshot: Snapshot, found: Verification, noted_root: str | None) -> None:
    previous, covered = "", {}
    for number, event in enumerate(snapshot.events, 1):
        if not isinstance(event, LegClosedEvent):
            continue
        if event.previous_root != previous:
            found.problems.append(f"event {number} chains on another root than the one before it")
        if chain_root(event.previous_root, event.covers) != event.root:
            found.problems.append(f"the root of event {number} is not that of what it covers")
        previous = event.root
        covered.update(event.covers)
    for key, sha in covered.items():
        if key not in snapshot.hashes:
            found.problems.append(f"the record `{key}` is lost: a closed leg covers it")
        elif snapshot.hashes[key] != sha:
            found.problems.append(f"the record `{key}` was changed since its leg closed")
    found.root, found.covered = previous, sum(key in covered for key in snapshot.hashes)
    if noted_root is not None and noted_root != previous:
        found.problems.append("the last root is not the one that ZenML's run metadata holds")
    elif noted_root is None and previous and snapshot.last_close is not None and snapshot.last_close.status == "completed":
        found.notes.append("ZenML's run metadata holds no root yet")
    closed = {event.epoch for event in snapshot.events if isinstance(event, LegClosedEvent)}
    for key in sorted(set(snapshot.hashes) - set(covered)):
        record = snapshot.records[key]
        if closed and record.epoch < max(closed):
            found.notes.append(
                f"`{record.display}` is late: a superseded executor (epoch {record.epoch}) stored it; nothing used it"
            )


def _legs(journal: Journal, snapshot: Snapshot, found: Verification) -> None:
    closed = {event.epoch for event in snapshot.events if isinstance(event, LegClosedEvent)}
    leases = journal.leases()
    found.legs = sum(lease.purpose != "settle" for lease in leases)
    for lease in leases:
        if lease.purpose != "settle" and lease.epoch not in closed:
            beat = journal.beat(lease.epoch)
            how = "released its lease" if beat is not None and beat.released else "was killed or superseded, or is running"
            found.notes.append(f"the leg of epoch {lease.epoch} ({lease.holder}) closed nothing: it {how}")


def _record(journal: Journal, snapshot: Snapshot, key: str, record: StepRecord, found: Verification) -> None:
    if record.run_id != journal.run_id:
        found.problems.append(f"the record `{key}` belongs to run {record.run_id}")
    value = record.outcome
    if (value is None) == (record.failure is None):
        found.problems.append(f"`{record.display}` has not exactly one of outcome and failure")
    if isinstance(value, BlobValue | PickledValue):
        try:
            data = journal.blob(value.sha256)
            if hashlib.sha256(data).hexdigest() != value.sha256:
                found.problems.append(f"the blob {value.sha256[:12]} of `{record.display}` was changed")
        except CorruptRecord as error:
            found.problems.append(f"the blob {value.sha256[:12]} of `{record.display}`: {error.reason}")
    problem = _inputs_problem(journal, snapshot, record)
    if problem:
        found.problems.append(f"the inputs of `{record.display}` {problem}")


def _inputs_problem(journal: Journal, snapshot: Snapshot, record: StepRecord) -> str | None:
    """Why the stored inputs are not what their digests say, or `None`."""

    def outcome(key: str) -> object:
        value = snapshot.records[key].outcome
        return None if value is None else value_tree(value, journal.blob)

    try:
        trees = resolve_inputs(record.inputs, lambda key: snapshot.records[key].inputs, outcome)
    except (KeyError, IndexError, TypeError, KitaruError) as error:
        return f"refer to what is not there ({type(error).__name__}: {error})"
    for name, digest in record.arguments.items():
        if name in trees and digest_tree(trees[name])[: len(digest)] != digest:
            return f"do not match their digest in argument `{name}`"
    return None
