"""The journal of one run: reads all of it at once, appends to it, object by object.

Relies on a `Store` whose `create` decides races. Knows nothing of ZenML pipelines. Never changes what is stored: a record is
created or adopted, an event is appended under the next free number.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from kitaru_zenml.errors import CorruptRecord, JournalGap
from kitaru_zenml.journal.records import (
    Beat,
    Lease,
    LegClosedEvent,
    OpenWait,
    RetireEvent,
    RetryEvent,
    RunInfo,
    StartedMarker,
    StepRecord,
    beat_name,
    blob_name,
    cancel_name,
    event_name,
    lease_name,
    run_folder,
    seal,
    sealed_hash,
    step_name,
    unseal,
    unseal_event,
)
from kitaru_zenml.journal.store import ObjectNotFound, Store

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
        """
        folder = run_folder(self.run_id)
        names = [
            n
            for n in self.store.list(folder)
            if re.match(r"(run\.json|(steps|started|waits|events)/[^/]+\.json)$", n[len(folder) :])
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
                else:
                    snapshot.info = unseal(RunInfo, data, name)
            except CorruptRecord as error:
                if on_corrupt is None:
                    raise
                on_corrupt(error)
                if kind == "events":
                    events[int(key)] = None
        if missing := [n for n in range(1, max(events, default=0)) if n not in events]:
            raise JournalGap(self.run_id, missing)
        snapshot.events = [event for _, event in sorted(events.items()) if event is not None]
        self._next_event = max(events, default=0) + 1
        return snapshot

    def record(self, key: str) -> StepRecord:
        """One record.

        Raises:
            ObjectNotFound: If there is none under this key.
        """
        name = step_name(self.run_id, key)
        return unseal(StepRecord, self.store.get(name), name)

    def records(self, keys: Sequence[str]) -> list[StepRecord]:
        """Some records, read at once; those that do not exist are left out."""
        names = [step_name(self.run_id, key) for key in keys]
        found = zip(names, self.store.get_many(names), strict=True)
        return [unseal(StepRecord, data, name) for name, data in found if data is not None]

    def blob(self, sha256: str) -> bytes:
        """A large value's bytes.

        Raises:
            CorruptRecord: If it is missing.
        """
        try:
            return self.store.get(blob_name(self.run_id, sha256))
        except ObjectNotFound:
            raise CorruptRecord(blob_name(self.run_id, sha256), "it is missing, though a record refers to it") from None

    def open_waits(self) -> list[OpenWait]:
        """What the run waits for, the oldest first: stored waits without a record. Answered ones that nobody consumed are among them."""
        folder = run_folder(self.run_id)
        finished = {name.rpartition("/")[2] for name in self.store.list(folder + "steps/")}
        names = [name for name in self.store.list(folder + "waits/") if name.rpartition("/")[2] not in finished]
        found = [
            unseal(OpenWait, data, n) for n, data in zip(names, self.store.get_many(names), strict=True) if data is not None
        ]
        return sorted(found, key=lambda wait: (wait.asked_at, wait.display))

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
