"""What comes to a run from outside: answers, sent events, a request to cancel. Each is created once, under its idempotency key.

`Inbox` is a mirror of the folder that reads only what is new; the executing leg keeps one, and whoever answers or decides whether a
run needs somebody makes one for the moment.
"""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
from typing import Any

from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.records import (
    Answer,
    CancelRequest,
    RefusedAnswer,
    SentEvent,
    answer_name,
    cancel_name,
    refused_name,
    run_folder,
    seal,
    sent_event_name,
    unseal_inbox_item,
)


class Inbox:
    """The inbox of one run as read so far. Thread-safe."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.cancel: CancelRequest | None = None
        self._lock = threading.Lock()
        self._seen: set[str] = set()
        self._answers: dict[tuple[str, int], Answer] = {}
        self._refused: dict[tuple[str, int], RefusedAnswer] = {}
        self._events: dict[str, list[tuple[int, str, SentEvent]]] = {}
        self._taken: dict[str, SentEvent | None] = {}  # by object name; `None` if an earlier leg took it

    def refresh(self) -> bool:
        """Read what is new.

        Returns:
            Whether there was something.

        Raises:
            CorruptRecord: If an object does not fit its own hash or model.
        """
        folder = run_folder(self.journal.run_id) + "inbox/"
        new = [name for name in self.journal.store.list(folder) if name not in self._seen and name.endswith(".json")]
        for name, data in zip(new, self.journal.store.get_many(new), strict=True):
            if data is None:
                continue
            item = unseal_inbox_item(data, name)
            with self._lock:
                if name not in self._seen:
                    self._seen.add(name)
                    self._sort_in(name, item)
        return bool(new)

    def _sort_in(self, name: str, item: Answer | RefusedAnswer | SentEvent | CancelRequest) -> None:
        match item:
            case Answer():
                self._answers[item.wait, item.number] = item
            case RefusedAnswer():
                self._refused[item.wait, item.number] = item
            case SentEvent():
                if name not in self._taken:
                    bisect.insort(self._events.setdefault(item.name, []), (item.sent_at, name, item), key=lambda e: e[:2])
            case CancelRequest():
                self.cancel = item

    @property
    def size(self) -> int:
        """How many objects it has read."""
        return len(self._seen)

    # --- answers ---

    def answer(self, wait: str, number: int | None = None) -> Answer | None:
        """The answer to a wait that counts, the first that was not refused; or the one of a number."""
        with self._lock:
            if number is None:
                number = 0
                while (wait, number) in self._refused:
                    number += 1
            return self._answers.get((wait, number))

    def note_refusal(self, refusal: RefusedAnswer) -> None:
        """This process has just refused an answer."""
        with self._lock:
            self._refused[refusal.wait, refusal.number] = refusal

    def refusals(self, wait: str) -> list[RefusedAnswer]:
        """The answers to a wait that did not fit, oldest first."""
        with self._lock:
            return sorted((r for (of, _), r in self._refused.items() if of == wait), key=lambda r: r.number)

    # --- events ---

    def take_event(self, name: str) -> tuple[str, SentEvent] | None:
        """Take the next event of a name, with its object name."""
        with self._lock:
            waiting = self._events.get(name)
            if not waiting:
                return None
            _, item, event = waiting.pop(0)
            self._taken[item] = event
            return item, event

    def put_back(self, item: str) -> None:
        """A taken event did not reach the journal: the next call gets it."""
        with self._lock:
            if (event := self._taken.pop(item, None)) is not None:
                bisect.insort(self._events.setdefault(event.name, []), (event.sent_at, item, event), key=lambda e: e[:2])

    def forget(self, items: Iterable[str]) -> None:
        """Some events were taken by steps of earlier legs."""
        with self._lock:
            self._taken.update(dict.fromkeys(items))
            for name, waiting in self._events.items():
                self._events[name] = [e for e in waiting if e[1] not in self._taken]


# --- putting in ----------------------------------------------------------------------------------------------------------


def put_answer(journal: Journal, answer: Answer) -> Answer:
    """Store an answer; returns the one that counts, which is another if somebody was faster."""
    stored: Answer = _put(journal, answer_name(journal.run_id, answer.wait, answer.number), answer)
    return stored


def put_refusal(journal: Journal, refusal: RefusedAnswer) -> None:
    """Say that an answer does not count."""
    _put(journal, refused_name(journal.run_id, refusal.wait, refusal.number), refusal)


def put_event(journal: Journal, event: SentEvent) -> SentEvent:
    """Store a sent event; returns the one that is stored under its idempotency key."""
    stored: SentEvent = _put(journal, sent_event_name(journal.run_id, event.name, event.idempotency_key), event)
    return stored


def put_cancel(journal: Journal, request: CancelRequest) -> CancelRequest:
    """Store a request to cancel; returns the first one."""
    stored: CancelRequest = _put(journal, cancel_name(journal.run_id), request)
    return stored


def _put(journal: Journal, name: str, item: Any) -> Any:
    theirs = journal.store.create(name, seal(item))
    return item if theirs is None else unseal_inbox_item(theirs, name)
