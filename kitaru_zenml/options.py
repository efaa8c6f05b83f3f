"""What a flow and a step can be told: two frozen models, the only place that says the defaults."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

OnDrift = Literal["raise", "reuse", "rerun"]
Lineage = Literal["async", "sync"]


@dataclass(frozen=True)
class StepOptions:
    """How one step runs.

    Attributes:
        retries: How often the body is tried again after a failure.
        retry_delay: Seconds before the first retry.
        retry_backoff: Factor by which each further delay grows.
        retry_max_delay: Largest delay in seconds.
        retry_on: Exception classes that are tried again; everything else fails at once.
        timeout: Seconds one attempt may take, or `None`. An async body is cancelled; a sync body cannot be interrupted, it goes on in
            its thread and its result is dropped.
        at_most_once: Never start the body a second time; a crash during it leaves the step in doubt. Excludes `retries`.
        ignore: Arguments that do not identify the call, because they are volatile (a timestamp, a request id).
        on_drift: What to do when a finished step is asked again with other inputs; `None` takes the flow's setting.
        isolated: Run as a native ZenML step in a container of its own, where the orchestrator can.
        resources: ZenML `ResourceSettings` of an isolated step.
        step_operator: Name of the ZenML step operator of an isolated step.
        limit: Name of a limit: a worker that was given its size runs at most so many bodies of it at once, over all its processes.
        metadata: JSON-like values for the step run's metadata in ZenML.
    """

    retries: int = 0
    retry_delay: float = 1.0
    retry_backoff: float = 2.0
    retry_max_delay: float = 60.0
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    timeout: float | None = None
    at_most_once: bool = False
    ignore: tuple[str, ...] = ()
    on_drift: OnDrift | None = None
    isolated: bool = False
    resources: Any = None
    step_operator: str | None = None
    limit: str | None = None
    metadata: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.at_most_once and self.retries:
            raise ValueError("a step marked `at_most_once` cannot have `retries`: a retry would run it twice")
        if self.retries < 0 or (self.timeout is not None and self.timeout <= 0):
            raise ValueError("`retries` must be 0 or more and `timeout` more than 0 seconds")
        if self.resources is not None and not self.isolated:
            raise ValueError("`resources` need `isolated=True`: other steps share the process of the flow")

    def delay_before(self, retry: int) -> float:
        """Seconds to wait before retry number `retry` (from 1): exponential, with up to 10% of jitter so that retries spread."""
        delay = min(self.retry_delay * self.retry_backoff ** (retry - 1), self.retry_max_delay)
        return delay * (1 + 0.1 * random.random())

    def is_retried(self, error: BaseException) -> bool:
        """Whether a failure of this kind is tried again."""
        return isinstance(error, self.retry_on)


@dataclass(frozen=True)
class FlowOptions:
    """How a run is kept.

    Attributes:
        lineage: `async` registers steps in ZenML behind the run, `sync` before the next step.
        lapse_seconds: After how many seconds without a heartbeat another process may take the run over.
        inline_limit: Bytes of JSON up to which an outcome is stored in the step's record; a larger one is an object of its own.
        max_workers: Threads for `.submit` and `.map` of sync steps, a scope each.
        max_children: Child runs that one process executes at once.
        on_drift: What to do when a finished step is asked again with other inputs: stop (`raise`), take the recorded outcome (`reuse`) or
            run the call anew and retire the record (`rerun`).
        grace: Seconds that the process goes on waiting for an answer, an event or child runs before the run suspends and the process may
            end; `None` never suspends. A sleep that is longer suspends at once.
        allow_pickle: Store values that have neither a JSON form nor a ZenML materializer by pickle. Loading them runs code.
        limit: Name of a limit: a worker that was given its size continues at most so many runs of it at once.
    """

    lineage: Lineage = "async"
    lapse_seconds: float = 30.0
    inline_limit: int = 256 * 1024
    max_workers: int = 32
    max_children: int = 8
    on_drift: OnDrift = "raise"
    grace: float | None = 10.0
    allow_pickle: bool = False
    limit: str | None = None

    def __post_init__(self) -> None:
        if self.lapse_seconds <= 0 or self.max_workers < 1 or self.max_children < 1 or self.inline_limit < 0:
            raise ValueError(
                "`lapse_seconds`, `max_workers` and `max_children` must be positive and `inline_limit` not negative"
            )
        for name, value, allowed in (
            ("lineage", self.lineage, ("async", "sync")),
            ("on_drift", self.on_drift, ("raise", "reuse", "rerun")),
        ):
            if value not in allowed:
                raise ValueError(f"`{name}` is one of {', '.join(allowed)}, not `{value}`")


def as_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)
