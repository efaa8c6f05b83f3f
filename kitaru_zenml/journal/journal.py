"""The journal of one run: reads all of it at once, appends to it, object by object.

Relies on a `Store` whose `create` decides races. Knows nothing of ZenML pipelines. Never changes what is stored: a record is
created or adopted, an event is appended under the next free number.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kitaru_zenml.errors import CorruptRecord, JournalGap, RunBeingDeleted
from kitaru_zenml.inputs import references
from kitaru_zenml.journal.records import (
    Beat,
    Fork,
    Lease,
    LegClosedEvent,
    OpenWait,
    RetireEvent,
    RetryEvent,
    Reused,
    RunInfo,
    StartedMarker,
    StepRecord,
    beat_name,
    blob_name,
    cancel_name,
    event_name,
    fork_name,
    lease_name,
    run_folder,
    seal,
    sealed_hash,
    step_name,
    unseal,
    unseal_event,
)
from kitaru_zenml.journal.store import ObjectNotFound, Store

ASKED_FOR = "asked_for"  # in the metadata of a fork's own outcome: which of the records it was given
AnyEvent = RetryEvent | RetireEvent | LegClosedEvent


def new_nonce() -> str:
    """What tells one writer's object from another's equal one."""
    return secrets.token_hex(8)


@dataclass
class Snapshot:
    """A journal as read at one moment, by object key."""

    records: dict[str, StepRecord] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    markers: dict[str, StartedMarker] = field(default_factory=dict)
    waits: dict[str, OpenWait] = field(default_factory=dict)
    events: list[AnyEvent] = field(default_factory=list)
    info: RunInfo | None = None
    fork: Fork | None = None
    fork_hash: str = ""
    reused: dict[str, Reused] = field(default_factory=dict)  # those of `records` that another run holds

    @property
    def first_root(self) -> str:
        """What the chain of roots begins with: nothing, or the hash of what the fork reuses."""
        return self.fork_hash

    @property
    def overridden(self) -> dict[str, StepRecord]:
        """The records that a person gave this fork, by key."""
        return {key: self.records[key] for key in (self.fork.overridden if self.fork else ()) if key in self.records}

    @property
    def untaken(self) -> set[str]:
        """Reused records that no call of a leg that ended in order took."""
        return self.reused.keys() - {key for event in self.events if isinstance(event, LegClosedEvent) for key in event.covers}

    def asked_for(self) -> set[str]:
        """Of what a fork was given, what its calls are known to have taken: a closed leg covers it, or its own records show it.

        What is taken is covered when a leg closes. After a leg that was killed, a step that it finished is not asked again, nor what the
        step took: that shows by what lies inside the step, and what records refer to.
        """
        given = {*self.reused, *self.overridden}
        own = [record for key, record in self.records.items() if key not in given]
        found = self.reused.keys() - self.untaken
        for record in own:
            referred = (key for keys in references(record.inputs).values() for key in keys)
            found |= {*record.after, *referred, *record.metadata.get(ASKED_FOR, ())}
        found &= given
        finished = {record.path for record in own} | {self.records[key].path for key in found}
        turns = {(record.scope.group, record.turn) for record in own}
        for key in given - found:
            record = self.records[key]
            if (record.scope.group, record.turn) not in turns and any(scope.path in finished for scope in record.scopes):
                found.add(key)
        return found

    def not_asked_for(self) -> set[str]:
        """Reused records that no call will take: the flow came to its end without them, or something else took their place."""
        left = self.untaken
        if self.last_close is not None and self.last_close.status == "completed":
            return set(left)
        own = [r for key, r in self.records.items() if key not in self.reused]
        turns = {(r.scope.group, r.turn) for r in own}
        return {key for key in left if (self.records[key].scope.group, self.records[key].turn) in turns}

    @property
    def generations(self) -> dict[str, int]:
        """The generation that is open for each path that a retry or a retirement has reopened."""
        return {r.path: r.generation for e in self.events if isinstance(e, RetryEvent | RetireEvent) for r in e.reopened}

    @property
    def retired(self) -> frozenset[str]:
        """Paths whose record was retired: unless they have run anew, no call claims them any more."""
        last = {
            r.path: isinstance(e, RetireEvent) for e in self.events if not isinstance(e, LegClosedEvent) for r in e.reopened
        }
        return frozenset(path for path, retired in last.items() if retired)

    def open_waits(self) -> list[OpenWait]:
        """What the run waits for, the oldest first: stored waits that are of the open generation and have no record."""
        current, opened = self.current(), self.generations
        found = [w for w in self.waits.values() if w.scope.path not in current and w.generation == opened.get(w.scope.path, 0)]
        return sorted(found, key=lambda wait: (wait.asked_at, wait.display))

    @property
    def last_close(self) -> LegClosedEvent | None:
        """How the last leg that ended in order ended."""
        return next((e for e in reversed(self.events) if isinstance(e, LegClosedEvent)), None)

    def current(self) -> dict[str, StepRecord]:
        """The records that answer: of each path the latest generation, if it is the open one or later. By path."""
        found: dict[str, StepRecord] = {}
        opened = self.generations
        for record in self.records.values():
            if record.generation < opened.get(record.path, 0):
                continue
            if record.path not in found or found[record.path].generation < record.generation:
                found[record.path] = record
        return found


class Journal:
    """The journal of run `run_id` in `store`."""

    def __init__(self, store: Store, run_id: str) -> None:
        self.store, self.run_id = store, run_id
        self._next_event = 1
        self._holders: dict[str, str] | None = None

    # --- reading ---

    def exists(self) -> bool:
        """Whether the run has a journal."""
        return self.info() is not None

    def info(self) -> RunInfo | None:
        """What the run executes, or `None` if no leg has begun."""
        name = run_folder(self.run_id) + "run.json"
        try:
            return unseal(RunInfo, self.store.get(name), name)
        except ObjectNotFound:
            return None

    def load(self, on_corrupt: Callable[[CorruptRecord], None] | None = None) -> Snapshot:
        """Read the whole journal, blobs and heartbeats left out, in one listing and one round of concurrent reads.

        Args:
            on_corrupt: Gets each corrupt object, which is then left out; without it the first one is raised.

        Raises:
            CorruptRecord: If an object does not fit its own hash or model.
            JournalGap: If an event is missing.
            RunBeingDeleted: If somebody has begun to delete the run.
        """
        folder = run_folder(self.run_id)
        names = [
            n
            for n in self.store.list(folder)
            if re.match(r"((run|fork|deleting)\.json|(steps|started|waits|events)/[^/]+\.json)$", n[len(folder) :])
        ]
        snapshot = Snapshot()
        events: dict[int, AnyEvent | None] = {}
        for name, data in zip(names, self.store.get_many(names), strict=True):
            if data is None:  # deleted since it was listed
                continue
            kind, _, file = name[len(folder) :].rpartition("/")
            key = file.removesuffix(".json")
            try:
                if kind == "steps":
                    record = unseal(StepRecord, data, name)
                    if record.object_key != key:
                        raise CorruptRecord(name, f"it is the record of another step, `{record.display}`")
                    snapshot.records[key], snapshot.hashes[key] = record, sealed_hash(data)
                elif kind == "started":
                    snapshot.markers[key] = unseal(StartedMarker, data, name)
                elif kind == "waits":
                    snapshot.waits[key] = unseal(OpenWait, data, name)
                elif kind == "events":
                    events[int(key)] = unseal_event(data, name)
                elif key == "run":
                    snapshot.info = unseal(RunInfo, data, name)
                elif key == "fork":
                    snapshot.fork, snapshot.fork_hash = unseal(Fork, data, name), sealed_hash(data)
                else:
                    raise RunBeingDeleted(self.run_id)
            except CorruptRecord as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                if kind == "events":
                    events[int(key)] = None
        if snapshot.fork is not None:
            self._load_reused(snapshot, snapshot.fork, on_corrupt)
        if missing := [n for n in range(1, max(events, default=0)) if n not in events]:
            raise JournalGap(self.run_id, missing)
        snapshot.events = [event for _, event in sorted(events.items()) if event is not None]
        self._next_event = max(events, default=0) + 1
        return snapshot

    def _load_reused(self, snapshot: Snapshot, fork: Fork, on_corrupt: Callable[[CorruptRecord], None] | None) -> None:
        """Add the records that the fork reuses. A record of its own under the same key stands instead."""
        wanted = [(key, of) for key, of in fork.each_reused() if key not in snapshot.records]
        names = [step_name(of.run_id, key) for key, of in wanted]
        for (key, of), name, data in zip(wanted, names, self.store.get_many(names), strict=True):
            try:
                if data is None:
                    raise CorruptRecord(name, f"it is missing, though the fork {self.run_id} reuses it")
                if sealed_hash(data) != of.sha256:
                    raise CorruptRecord(name, f"it was changed since the fork {self.run_id} was made, which reuses it")
                snapshot.records[key] = unseal(StepRecord, data, name)
                snapshot.reused[key] = of
            except CorruptRecord as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)

    def fork(self) -> Fork | None:
        """What this run reuses of others; `None` if it is no fork."""
        try:
            return unseal(Fork, self.store.get(fork_name(self.run_id)), fork_name(self.run_id))
        except ObjectNotFound:
            return None

    @property
    def _reused(self) -> dict[str, str]:
        """Key -> the run that holds the record, for a fork. Read once: it is stored before the fork begins."""
        if self._holders is None:
            fork = self.fork()
            self._holders = {key: of.run_id for key, of in fork.each_reused()} if fork else {}
        return self._holders

    def record(self, key: str) -> StepRecord:
        """One record.

        Raises:
            ObjectNotFound: If there is none under this key.
        """
        name = step_name(self.run_id, key)
        try:
            return unseal(StepRecord, self.store.get(name), name)
        except ObjectNotFound:
            if key not in self._reused:
                raise
            name = step_name(self._reused[key], key)
            return unseal(StepRecord, self.store.get(name), name)

    def records(self, keys: Sequence[str]) -> list[StepRecord]:
        """Some records of the run itself, read at once; those that do not exist are left out."""
        names = [step_name(self.run_id, key) for key in keys]
        found = zip(names, self.store.get_many(names), strict=True)
        return [unseal(StepRecord, data, name) for name, data in found if data is not None]

    def of(self, record: StepRecord) -> Journal:
        """The journal in which what a record refers to is to be looked up: that of the run that stored it."""
        return self if record.run_id == self.run_id else Journal(self.store, record.run_id)

    def blob(self, sha256: str) -> bytes:
        """A large value's bytes.

        Raises:
            CorruptRecord: If it is missing.
        """
        try:
            return self.store.get(blob_name(self.run_id, sha256))
        except ObjectNotFound:
            holders = dict.fromkeys(self._reused.values())
        for data in self.store.get_many([blob_name(holder, sha256) for holder in holders]):
            if data is not None:
                return data
        raise CorruptRecord(blob_name(self.run_id, sha256), "it is missing, though a record refers to it")

    def waits(self) -> list[OpenWait]:
        """Every wait that was ever asked, the oldest first."""
        names = self.store.list(run_folder(self.run_id) + "waits/")
        found = [
            unseal(OpenWait, data, n) for n, data in zip(names, self.store.get_many(names), strict=True) if data is not None
        ]
        return sorted(found, key=lambda wait: (wait.asked_at, wait.display))

    def is_cancelled(self) -> bool:
        """Whether somebody asked the run to stop."""
        try:
            self.store.get(cancel_name(self.run_id))
        except ObjectNotFound:
            return False
        return True

    def forks(self) -> list[str]:
        """Ids of the runs that were forked from this one."""
        folder = run_folder(self.run_id) + "forks/"
        return [name[len(folder) :].removesuffix(".json") for name in self.store.list(folder)]

    def last_close(self) -> LegClosedEvent | None:
        """How the last leg that ended in order ended; reads the events only."""
        for name in reversed(self.store.list(run_folder(self.run_id) + "events/")):
            event = unseal_event(self.store.get(name), name)
            if isinstance(event, LegClosedEvent):
                return event
        return None

    def open_waits(self) -> list[OpenWait]:
        """What the run waits for, the oldest first: stored waits without a record. Answered ones that nobody consumed are among them."""
        folder = run_folder(self.run_id)
        finished = {name.rpartition("/")[2] for name in self.store.list(folder + "steps/")}
        names = [name for name in self.store.list(folder + "waits/") if name.rpartition("/")[2] not in finished]
        found = [
            unseal(OpenWait, data, n) for n, data in zip(names, self.store.get_many(names), strict=True) if data is not None
        ]
        return sorted(found, key=lambda wait: (wait.asked_at, wait.display))

    def leases(self) -> list[Lease]:
        """Every lease ever taken, oldest first: the run's legs."""
        folder = run_folder(self.run_id) + "lease/"
        names = [name for name in self.store.list(folder) if name.endswith(".json")]
        return [unseal(Lease, data, n) for n, data in zip(names, self.store.get_many(names), strict=True) if data is not None]

    def lease(self, epoch: int) -> Lease | None:
        """The lease of an epoch, if it was taken."""
        try:
            return unseal(Lease, self.store.get(lease_name(self.run_id, epoch)), lease_name(self.run_id, epoch))
        except ObjectNotFound:
            return None

    def beat(self, epoch: int) -> Beat | None:
        """The last heartbeat of an epoch; a torn one counts as none."""
        try:
            return Beat.model_validate_json(self.store.get(beat_name(self.run_id, epoch)))
        except (ObjectNotFound, ValueError):
            return None

    # --- writing ---

    def begin(self, info: RunInfo) -> RunInfo:
        """Store what the run executes, or return what an earlier leg stored."""
        name = run_folder(self.run_id) + "run.json"
        theirs = self.store.create(name, seal(info))
        return info if theirs is None else unseal(RunInfo, theirs, name)

    def append(self, event: AnyEvent) -> None:
        """Append an event under the next free number. Only the holder of the lease does this, so a number is rarely taken."""
        while self.store.create(event_name(self.run_id, self._next_event), seal(event)) is not None:
            self._next_event += 1
        self._next_event += 1
