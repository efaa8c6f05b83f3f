"""`sleep` and `sleep_until`: durable timers. The deadline is absolute and stored once, so that a crash does not start it anew."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from kitaru_zenml.journal.records import OpenWait, WaitKind
from kitaru_zenml.suspension import Arrival, await_in_run, grace_passed

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution


def sleep(duration: float | timedelta, *, name: str = "sleep") -> Any:
    """Let a time pass, counted from when it is first asked, also across crashes and suspensions.

    A sleep longer than the flow's `grace` suspends the run when nothing else in it moves. Returns `None`; in an async flow, an awaitable.

    Args:
        duration: Seconds, or a timedelta.
        name: Of the step that it becomes.

    Raises:
        ValueError: If the duration is negative.
        NotInRun: Outside a flow.
    """
    span = duration if isinstance(duration, timedelta) else timedelta(seconds=duration)
    if span < timedelta(0):
        raise ValueError(f"a sleep takes 0 seconds or more, not {span.total_seconds():g}")
    return await_in_run(Timer(span, None), name, {"seconds": span.total_seconds()}, None)


def sleep_until(moment: datetime, *, name: str = "sleep_until") -> Any:
    """Sleep until a moment; returns at once if it has passed. See `sleep`.

    Args:
        moment: With a time zone.
        name: Of the step that it becomes.

    Raises:
        ValueError: If the moment has no time zone.
        NotInRun: Outside a flow.
    """
    if moment.tzinfo is None:
        raise ValueError("`sleep_until` needs a moment with a time zone, for example datetime.now(UTC)")
    return await_in_run(Timer(None, moment.astimezone(UTC)), name, {"moment": moment.astimezone(UTC).isoformat()}, None)


@dataclass(frozen=True)
class Timer:
    """A `suspension.Waiting` for a time."""

    span: timedelta | None
    moment: datetime | None
    kind: WaitKind = "timer"
    every: float = 0

    def details(self, now: datetime) -> dict[str, Any]:
        """See `suspension.Waiting`."""
        return {"deadline": self.moment if self.moment is not None else now + (self.span or timedelta(0))}

    def arrived(self, wait: OpenWait, execution: Execution) -> Arrival | None:
        """See `suspension.Waiting`."""
        return Arrival() if _left(wait) <= 0 else None

    def give_back(self, arrival: Arrival, execution: Execution) -> None:
        """See `suspension.Waiting`: it is there for the next look all the same."""

    def suspends(self, wait: OpenWait, waited: float, execution: Execution) -> bool:
        """See `suspension.Waiting`: a long sleep needs no grace, a short one waits here."""
        return grace_passed(_left(wait), None, execution)


def _left(wait: OpenWait) -> float:
    assert wait.deadline is not None
    return (wait.deadline - datetime.now(UTC)).total_seconds()
