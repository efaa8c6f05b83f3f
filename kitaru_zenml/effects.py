"""What the engine asks its driver for, and what it must know of a caller: the border between deciding and doing."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Protocol

from kitaru_zenml.identity import Here


class Waiter(Protocol):
    """Something a call waits on. `set` may come from any thread."""

    def set(self) -> None:
        """Let the call go on."""


class Caller(Protocol):
    """How the call was made."""

    holds_loop: bool  # a sync call in a thread whose event loop it blocks: no other task of that loop can move

    def waiter(self) -> Waiter:
        """A fresh waiter of this caller's kind."""

    def hand_over(self, value: Any, error: BaseException | None) -> None:
        """Give the result to whoever has a future of this call, before the next result is released."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait until the waiter is set or the seconds have passed."""

    waiter: Waiter
    seconds: float


@dataclass(frozen=True, slots=True)
class Create:
    """Create an object; answers what `Store.create` does. Not interrupted by a cancellation."""

    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Perform:
    """Do blocking work off the event loop and answer its result."""

    work: Callable[[], Any]


@dataclass(frozen=True, slots=True)
class RunBody:
    """Run the step's body there, within the timeout."""

    here: Here
    timeout: float | None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let the seconds pass."""

    seconds: float


Effect = Wait | Create | Perform | RunBody | Sleep
Steps = Generator[Effect, Any, Any]
