"""Hints under `_due/`: which run needs somebody at which time. They make the worker's cost grow with what is due, not with all runs.

A hint is only a hint: it may be lost or stale, so whoever follows one looks at the run itself, and a slow sweep finds what has none.
Its name says all, so that one listing finds what is due: `_due/<UTC time>-<run id>`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import UTC, datetime

from kitaru_zenml.errors import StoreUnavailable
from kitaru_zenml.journal.records import DUE_FOLDER, due_name
from kitaru_zenml.journal.store import Store

logger = logging.getLogger("kitaru_zenml")
_TIME = "%Y%m%dT%H%M%S.%fZ"


@dataclass(frozen=True, order=True)
class Hint:
    """That run `run_id` needs somebody at a time."""

    at: datetime
    run_id: str

    @property
    def name(self) -> str:
        """Of its object."""
        return due_name(self.at, self.run_id)


def leave_hint(store: Store, run_id: str, at: datetime) -> Hint:
    """Say that a run needs somebody at a time. Never in the way of what follows: a hint that is lost costs time, nothing else."""
    hint = Hint(at.astimezone(UTC), run_id)
    try:
        store.create(hint.name, b"")
    except StoreUnavailable as problem:
        logger.warning("run %s: a hint for the worker could not be left: %s", run_id, problem)
    return hint


def remove_hint(store: Store, hint: Hint) -> None:
    """The hint has been followed, or what it told of has ended."""
    try:
        store.delete([hint.name])
    except StoreUnavailable as problem:
        logger.warning("run %s: a hint for the worker could not be removed: %s", hint.run_id, problem)


def hints(store: Store) -> list[Hint]:
    """Every hint there is, the earliest first."""
    found = []
    for name in store.list(DUE_FOLDER):
        time, _, run_id = name[len(DUE_FOLDER) :].partition("-")
        try:
            found.append(Hint(datetime.strptime(time, _TIME).replace(tzinfo=UTC), run_id))
        except ValueError:
            logger.warning("`%s` is no hint; it is left alone", name)
    return sorted(found)
