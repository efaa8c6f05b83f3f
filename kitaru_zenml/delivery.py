"""In which order results reach the code: the order in which they were numbered, live and on replay, one at a time.

A result is held until every lower number that is still coming has been handed over. Numbers are coming from the moment the journal
is loaded, or an outcome is about to be stored, until they are handed over or given up. Not thread-safe: the engine's lock guards it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from kitaru_zenml.effects import Waiter

Rank = tuple[int, str]  # number and path: records of superseded legs may share a number


class Delivery:
    """The results of one leg on their way to the code."""

    def __init__(self) -> None:
        self.delivering: Rank | None = None  # released, and has not reached its caller yet
        self._held: dict[Rank, tuple[Waiter, str]] = {}
        self._coming: list[Rank] = []  # a heap
        self._expected: set[Rank] = set()  # what of it counts

    def expect(self, rank: Rank) -> None:
        """A result of this rank is coming."""
        self._expected.add(rank)
        heapq.heappush(self._coming, rank)

    def forget(self, rank: Rank) -> None:
        """It has been handed over, or never will be."""
        self._expected.discard(rank)

    def is_next(self, rank: Rank) -> bool:
        """Whether a result may go on at once, without being held."""
        return self.delivering is None and not self._held and rank <= self._first_coming(rank)

    def hold(self, rank: Rank, waiter: Waiter, scope: str) -> None:
        """Keep a result until its turn; `scope` is where its caller waits."""
        self._held[rank] = (waiter, scope)
        self.release()

    def release(self) -> None:
        """Let the next one go, if the one before has reached its caller."""
        if self.delivering is None and self._held:
            ready = min(self._held)
            if ready <= self._first_coming(ready):
                self.delivering = ready
                self._held[ready][0].set()

    def give_up_on_those_before(self, rank: Rank) -> None:
        """Nothing moves any more: if this one is the first held, those before it are not coming."""
        if self.delivering is None and rank == min(self._held):
            while self._coming and self._coming[0] < rank:
                self._expected.discard(heapq.heappop(self._coming))
            self.release()

    def done(self, rank: Rank) -> None:
        """A held result has reached its caller, or its caller is gone."""
        del self._held[rank]
        self.forget(rank)
        if self.delivering == rank:
            self.delivering = None
        self.release()

    def waiters(self) -> Iterable[Waiter]:
        """Whoever waits for a turn."""
        return [waiter for waiter, _ in self._held.values()]

    def waiting_in(self) -> Iterable[str]:
        """Scopes in which somebody waits for a turn."""
        return [scope for _, scope in self._held.values()]

    def _first_coming(self, default: Rank) -> Rank:
        while self._coming and self._coming[0] not in self._expected:
            heapq.heappop(self._coming)
        return self._coming[0] if self._coming else default
