"""Verify a run end to end: recompute every hash, every digest and every root, and say what does not fit.

What is no alarm is said as a note: a leg that was killed closed nothing, and its records are covered by a later leg; a record that a
superseded executor stored after the run went on elsewhere is late, nobody asked for it; a leg that is still at work has covered nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

from kitaru_zenml.codec import value_tree
from kitaru_zenml.errors import CorruptRecord, JournalGap, KitaruError
from kitaru_zenml.inputs import digest_tree, resolve_inputs
from kitaru_zenml.journal.journal import Journal, Snapshot
from kitaru_zenml.journal.lease import is_gone
from kitaru_zenml.journal.records import (
    BlobValue,
    Lease,
    LegClosedEvent,
    PickledValue,
    StepRecord,
    chain_root,
    run_folder,
    step_name,
    unseal,
)


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        run_id: The run.
        records: How many records it has that can be read.
        covered: How many of them a closed leg covers.
        legs: How many legs it had.
        root: The last root.
        problems: What was changed or lost, each naming its object.
        notes: What looks odd and is no alarm.
    """

    run_id: str
    records: int = 0
    covered: int = 0
    legs: int = 0
    root: str = ""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was changed or lost."""
        return not self.problems


@dataclass
class _Found:
    """What is being found."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    corrupt: set[str] = field(default_factory=set)  # object names

    def is_corrupt(self, error: CorruptRecord) -> None:
        if error.name not in self.corrupt:
            self.corrupt.add(error.name)
            self.problems.append(f"`{error.name}` is corrupt: {error.reason}")


def verify(journal: Journal, noted_root: str | None = None) -> Verification:
    """Recompute the whole journal of a run.

    Args:
        journal: Of the run.
        noted_root: The last root according to ZenML's run metadata, if it has one.
    """
    found = _Found()
    leases = _leases(journal, found)
    legs = sum(lease.purpose != "settle" for lease in leases)
    try:
        snapshot = journal.load(on_corrupt=found.is_corrupt)
    except JournalGap as gap:  # what was retried, retired or covered is not known: no use in judging the records
        return Verification(journal.run_id, legs=legs, problems=(*found.problems, str(gap)), notes=tuple(found.notes))
    root, covered = _roots(journal, snapshot, found, noted_root)
    _legs(journal, snapshot, leases, found)
    for key, record in sorted(snapshot.records.items(), key=lambda item: item[1].number):
        _record(journal, snapshot, key, record, found)
    return Verification(
        journal.run_id, len(snapshot.records), covered, legs, root, problems=tuple(found.problems), notes=tuple(found.notes)
    )


def _leases(journal: Journal, found: _Found) -> list[Lease]:
    folder = run_folder(journal.run_id) + "lease/"
    names = [name for name in journal.store.list(folder) if name.endswith(".json")]
    leases: list[Lease] = []
    for name, data in zip(names, journal.store.get_many(names), strict=True):
        try:
            if data is not None:
                leases.append(unseal(Lease, data, name))
        except CorruptRecord as error:
            found.is_corrupt(error)
    epochs = [int(name.rpartition("/")[2].removesuffix(".json")) for name in names]
    found.problems += [f"the lease of epoch {n} is lost" for n in range(1, max(epochs, default=0)) if n not in epochs]
    return leases


def _roots(journal: Journal, snapshot: Snapshot, found: _Found, noted_root: str | None) -> tuple[str, int]:
    """Check the chain of roots and what they cover; returns the last root and how many records are covered."""
    roots = [snapshot.first_root]
    covered: dict[str, str] = {}
    closed = [event for event in snapshot.events if isinstance(event, LegClosedEvent)]
    for event in closed:
        if event.previous_root != roots[-1]:
            found.problems.append(f"the close of leg {event.epoch} chains on another root than that of the close before it")
        if chain_root(event.previous_root, event.covers) != event.root:
            found.problems.append(f"the root of leg {event.epoch} is not that of what it covers")
        roots.append(event.root)
        covered.update(event.covers)
    holders = snapshot.fork.needs if snapshot.fork is not None else ()
    for key, sha in covered.items():
        known = snapshot.hashes.get(key) or (snapshot.reused[key].sha256 if key in snapshot.reused else None)
        if known is not None:
            if known != sha:
                found.problems.append(f"the record `{key}` was changed since its leg closed")
        elif not any(step_name(run_id, key) in found.corrupt for run_id in (journal.run_id, *holders)):
            found.problems.append(f"the record `{key}` is lost: a closed leg covers it")
    if noted_root is not None and noted_root not in roots:
        found.problems.append("ZenML's run metadata holds a root that is not in the journal: events of it were changed or lost")
    elif noted_root != roots[-1] and len(roots) > 1:
        found.notes.append("ZenML's run metadata does not hold the last root yet: its leg was killed before it could note it")
    last = max((event.epoch for event in closed), default=0)
    for key in sorted(set(snapshot.hashes) - set(covered)):
        record = snapshot.records[key]
        if record.epoch <= last:
            told = (
                f"`{record.display}` is late: leg {record.epoch} stored it when it was superseded or had ended; nothing used it"
            )
            found.notes.append(told)
    return roots[-1], sum(key in covered for key in (*snapshot.hashes, *snapshot.reused))


def _legs(journal: Journal, snapshot: Snapshot, leases: Sequence[Lease], found: _Found) -> None:
    closed = {event.epoch for event in snapshot.events if isinstance(event, LegClosedEvent)}
    last = max((lease.epoch for lease in leases), default=0)
    for lease in leases:
        if lease.purpose == "settle" or lease.epoch in closed:
            continue
        beat = journal.beat(lease.epoch)
        if beat is not None and beat.released:
            how = "gave up before it began"
        elif lease.epoch < last or is_gone(lease.holder):
            how = "was killed or superseded and closed nothing"
        else:
            how = "has not closed yet: it may still be at work"
        own = sum(snapshot.records[key].epoch == lease.epoch for key in snapshot.hashes)
        found.notes.append(f"leg {lease.epoch} ({lease.holder}) {how}; it stored {own} record{'s' * (own != 1)}")


def _record(journal: Journal, snapshot: Snapshot, key: str, record: StepRecord, found: _Found) -> None:
    holder = snapshot.reused[key].run_id if key in snapshot.reused else journal.run_id
    if record.run_id != holder:
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
    problem = None if key in snapshot.reused else _inputs_problem(journal, snapshot, record)
    if problem:
        found.problems.append(f"the inputs of `{record.display}` {problem}")


def _inputs_problem(journal: Journal, snapshot: Snapshot, record: StepRecord) -> str | None:
    """Why the stored inputs are not what their digests say, or `None`."""

    def outcome(key: str) -> object:
        value = snapshot.records[key].outcome
        return None if value is None else value_tree(value, journal.blob)

    try:
        trees = resolve_inputs(record.inputs, lambda key: snapshot.records[key].inputs, outcome)
    except KeyError as missing:
        return f"refer to a record that is not there: {missing.args[0]}"
    except (IndexError, TypeError, KitaruError) as error:
        return f"refer to what is not there ({type(error).__name__}: {error})"
    for name, digest in record.arguments.items():
        if name in trees and digest_tree(trees[name])[: len(digest)] != digest:
            return f"do not match their digest in argument `{name}`"
    return None
