"""Answers that are given in ZenML (dashboard, `zenml pipeline runs wait-conditions resolve`) leave no hint: one query finds them all.

The query asks for wait conditions resolved since the last one, by the server's own clock. Each is taken over into its run's journal, and
leaves the hint that every other answer leaves. What is answered while no worker runs is found by the sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from uuid import UUID

from zenml.client import Client
from zenml.enums import RunWaitConditionStatus
from zenml.models import RunWaitConditionResponse

from kitaru_zenml.conditions import adopt, answer_number
from kitaru_zenml.journal.due import leave_hint
from kitaru_zenml.journal.inbox import Inbox
from kitaru_zenml.journal.journal import Journal

PAGE = 100
OVERLAP = timedelta(seconds=2)  # ZenML compares whole seconds


class Answers:
    """What was answered in ZenML since the worker began to look."""

    def __init__(self, journal_of: Callable[[UUID], Journal | None]) -> None:
        self._journal_of = journal_of  # `None` for a run that is not watched
        self._mark: datetime | None = None
        self._seen: dict[UUID, datetime] = {}  # conditions at or after the mark

    def start(self) -> None:
        """Take note of the last answer there is; only later ones count."""
        found = self._resolved(sort_by="desc:resolved_at", size=1)
        latest = found[0].resolved_at if found else None
        self._mark = (latest or datetime.now(UTC).replace(tzinfo=None) - timedelta(days=1)) - OVERLAP

    def take_over(self) -> int:
        """Take over what is new; how many answers it was.

        Raises:
            Exception: If ZenML or a store does not answer: the same is found again next time.
        """
        if self._mark is None:
            self.start()
        assert self._mark is not None
        taken = 0
        while True:
            since = f"gte:{self._mark:%Y-%m-%d %H:%M:%S}"
            found = self._resolved(resolved_at=since, sort_by="asc:resolved_at", size=PAGE)
            new = [c for c in found if c.id not in self._seen and c.resolved_at is not None]
            for condition in new:
                taken += self._adopt(condition)
                assert condition.resolved_at is not None
                self._seen[condition.id] = condition.resolved_at
            if new:
                self._mark = max(self._mark, max(self._seen.values()) - OVERLAP)
                self._seen = {id: at for id, at in self._seen.items() if at >= self._mark - OVERLAP}
            if len(found) < PAGE or not new:
                return taken

    def _resolved(self, **query: object) -> list[RunWaitConditionResponse]:
        found = Client().list_run_wait_conditions(status=RunWaitConditionStatus.RESOLVED.value, hydrate=True, **query)  # type: ignore[arg-type]
        return list(found.items)

    def _adopt(self, condition: RunWaitConditionResponse) -> bool:
        journal = self._journal_of(condition.run.id)
        if journal is None:
            return False
        inbox = Inbox(journal)
        inbox.refresh()
        wait = next((w for w in journal.open_waits() if answer_number(w, condition.name) is not None), None)
        if wait is None or inbox.answer(wait.key) is not None:
            return False
        adopt(condition, wait, journal, inbox)
        leave_hint(journal.store, journal.run_id, datetime.now(UTC))
        return True
