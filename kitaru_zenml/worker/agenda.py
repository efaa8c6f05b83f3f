"""The hints of one artifact store: which runs are to be looked at, and when.

A hint is removed only when what it told of is settled; a worker that dies before leaves it for the next. Of several hints of one run
the earliest counts, so that workers that put off the same run do not multiply them.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from kitaru_zenml.errors import StoreUnavailable
from kitaru_zenml.journal.due import leave_hint
from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml.journal.records import DUE_FOLDER, due_name
from kitaru_zenml.journal.store import Store

KEPT_UNKNOWN = timedelta(days=7)  # a hint of a run that ZenML does not know: another ZenML may use the same store
COARSE = 5.0  # seconds from which on a time is rounded up, so that workers name the same hint
IDLE_AFTER = 10.0  # seconds without anything due after which an object store is asked less often
SLOWEST = 2.0  # seconds between two looks then


class Agenda:
    """The hints of one store, as listed last."""

    def __init__(self, store: Store, poll: float) -> None:
        self.store, self._poll = store, poll
        self.next_read = 0.0
        self._active = time.monotonic()
        self._names: list[str] = []  # sorted, so by time
        self._known: dict[str, list[str]] = {}  # run id -> its hints
        self._trouble = 0

    def __len__(self) -> int:
        return len(self._names)

    def read(self) -> None:
        """List the hints. Does not raise for a store that does not answer: it is asked less and less often.

        Raises:
            StoreUnavailable: The first time that it does not answer.
        """
        began = time.monotonic()
        try:
            self._names = self.store.list(DUE_FOLDER)
        except StoreUnavailable:
            self._trouble += 1
            self.next_read = began + min(self._poll * 2**self._trouble, 30.0)
            raise
        self._trouble = 0
        self._known = {}
        for name in self._names:
            self._known.setdefault(name.partition("-")[2], []).append(name)
        self.next_read = time.monotonic() + self._pause(began)

    def _pause(self, now: float) -> float:
        if self.due():
            self._active = now
        if isinstance(self.store, LocalStore) or now - self._active < IDLE_AFTER:
            return self._poll
        return max(self._poll, min(4 * self._poll, SLOWEST))

    def due(self) -> list[str]:
        """Runs that are due, the longest overdue first."""
        until = due_name(datetime.now(UTC), "~")
        found: dict[str, None] = {}
        for name in self._names:
            if name > until:
                break
            found.setdefault(name.partition("-")[2], None)
        return list(found)

    def drop(self, run_id: str) -> None:
        """The run needs nothing more: remove its hints that are due."""
        until = due_name(datetime.now(UTC), "~")
        due = [name for name in self._known.get(run_id, ()) if name <= until]
        if due:
            self.store.delete(due)
            self._forget(run_id, due)

    def put_off(self, run_id: str, at: datetime) -> None:
        """Have the run looked at again at a time: see that there is a hint not later than that, and remove those that are due."""
        now = datetime.now(UTC)
        if (at - now).total_seconds() >= COARSE and at.microsecond:
            at = at.replace(microsecond=0) + timedelta(seconds=1)
        coming = [name for name in self._known.get(run_id, ()) if due_name(now, "~") < name <= due_name(at, "~")]
        if not coming:
            hint = leave_hint(self.store, run_id, max(at, now))
            self._known.setdefault(run_id, []).append(hint.name)
        self.drop(run_id)

    def unknown(self, run_id: str) -> bool:
        """ZenML does not know the run: remove its hints if they are old; whether any are left."""
        old = due_name(datetime.now(UTC) - KEPT_UNKNOWN, "~")
        names = [name for name in self._known.get(run_id, ()) if name <= old]
        if names:
            self.store.delete(names)
            self._forget(run_id, names)
        return bool(self._known.get(run_id))

    def _forget(self, run_id: str, names: list[str]) -> None:
        gone = set(names)
        self._names = [name for name in self._names if name not in gone]
        self._known[run_id] = [name for name in self._known.get(run_id, ()) if name not in gone]
