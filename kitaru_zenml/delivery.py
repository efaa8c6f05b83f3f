"""In which order results reach the code: the order in which they were numbered, live and on replay, one at a time.

A result is held until every lower number that is still coming has been handed over. Numbers are coming from the moment the journal
is loaded, or an outcome is about to be stored, until they are handed over or given up. Not thread-safe: the engine's lock guards it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from kitaru_zenml.effects import Waiter


class Delivery:
    """The results of one leg on their way to the code."""

    def __init__(self) -> None:
        self.delivering: int | None = None  # released, and has not reached its caller yet
        self._held: dict[int, tuple[Waiter, str]] = {}
        self._coming: list[int] = []  # a heap
        self._expected: set[int] = set()  # what of it counts

    def expect(self, number: int) -> None:
        """A result with this number is coming."""
        self._expected.add(number)
        heapq.heappush(self._coming, number)

    def expects(self, number: int) -> bool:
        """Whether it is still coming."""
        return number in self._expected

    def forget(self, number: int) -> None:
        """It has been handed over, or never will be."""
        self._expected.discard(number)

    def is_next(self, number: int) -> bool:
        """Whether a result may go on at once, without being held."""
        return self.delivering is None and not self._held and number <= self._first_coming(number)

    def hold(self, number: int, waiter: Waiter, scope: str) -> None:
        """Keep a result until its turn; `scope` is where its caller waits."""
        self._held[number] = (waiter, scope)
        self.release()

    def release(self) -> None:
        """Let the next one go, if the one before has reached its caller."""
        if self.delivering is None and self._held:
            ready = min(self._held)
            if ready <= self._first_coming(ready):
                self.delivering = ready
                self._held[ready][0].set()

    def give_up_on_those_before(self, number: int) -> None:
        """Nothing moves any more: if this one is the first held, those before it are not coming."""
        if self.delivering is None and number == min(self._held):
            while self._coming and self._coming[0] < number:
                self._expected.discard(heapq.heappop(self._coming))
            self.release()

    def done(self, number: int) -> None:
        """A held result has reached its caller, or its caller is gone."""
        del self._held[number]
        self.forget(number)
        if self.delivering == number:
            self.delivering = None
        self.release()

    def waiters(self) -> Iterable[Waiter]:
        """Whoever waits for a turn."""
        return [waiter for waiter, _ in self._held.values()]

    def waiting_in(self) -> Iterable[str]:
        """Scopes in which somebody waits for a turn."""
        return [scope for _, scope in self._held.values()]

    def _first_coming(self, default: int) -> int:
        while self._coming and self._coming[0] not in self._expected:
            heapq.heappop(self._coming)
        return self._coming[0] if self._coming else default
