"""A durable runtime for AI agents, shaped as a ZenML plugin.

The public names, loaded when they are first used, so that `import kitaru_zenml` and `kitaru --help` do not pay for ZenML's import.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "flow": "flows",
    "Flow": "flows",
    "checkpoint": "checkpoints",
    "Checkpoint": "checkpoints",
    "current_step": "checkpoints",
    "StepFuture": "futures",
    "as_completed": "futures",
    "wait": "waits",
    "sleep": "timers",
    "sleep_until": "timers",
    "event": "events",
    "gather_runs": "children",
    "now": "recorded",
    "random": "recorded",
    "uuid4": "recorded",
    "RunHandle": "runs",
    "resume": "resumption",
    "settle": "resumption",
    "replay": "forks",
    "delete": "deletion",
    "KitaruError": "errors",
    "InputsDrifted": "errors",
    "LeaseLost": "errors",
    "NotDurableError": "errors",
    "RecordedFailure": "errors",
    "RunSuspended": "errors",
    "RunCancelled": "errors",
    "ChildRunFailed": "errors",
    "InvalidAnswer": "errors",
    "AlreadyAnswered": "errors",
    "WaitTimedOut": "errors",
    "EventTimedOut": "errors",
    "RunIsLeased": "errors",
    "StepInDoubt": "errors",
    "StepTimeout": "errors",
}
__all__ = [  # spelt out, because type checkers read only that
    "__version__",
    "flow",
    "Flow",
    "checkpoint",
    "Checkpoint",
    "current_step",
    "StepFuture",
    "as_completed",
    "wait",
    "sleep",
    "sleep_until",
    "event",
    "gather_runs",
    "now",
    "random",
    "uuid4",
    "RunHandle",
    "resume",
    "settle",
    "replay",
    "delete",
    "KitaruError",
    "InputsDrifted",
    "LeaseLost",
    "NotDurableError",
    "RecordedFailure",
    "RunSuspended",
    "RunCancelled",
    "ChildRunFailed",
    "InvalidAnswer",
    "AlreadyAnswered",
    "WaitTimedOut",
    "EventTimedOut",
    "RunIsLeased",
    "StepInDoubt",
    "StepTimeout",
]

if TYPE_CHECKING:
    from kitaru_zenml.checkpoints import Checkpoint, checkpoint, current_step
    from kitaru_zenml.children import gather_runs
    from kitaru_zenml.deletion import delete
    from kitaru_zenml.errors import (
        AlreadyAnswered,
        ChildRunFailed,
        EventTimedOut,
        InputsDrifted,
        InvalidAnswer,
        KitaruError,
        LeaseLost,
        NotDurableError,
        RecordedFailure,
        RunCancelled,
        RunIsLeased,
        RunSuspended,
        StepInDoubt,
        StepTimeout,
        WaitTimedOut,
    )
    from kitaru_zenml.events import event
    from kitaru_zenml.flows import Flow, flow
    from kitaru_zenml.forks import replay
    from kitaru_zenml.futures import StepFuture, as_completed
    from kitaru_zenml.recorded import now, random, uuid4
    from kitaru_zenml.resumption import resume, settle
    from kitaru_zenml.runs import RunHandle
    from kitaru_zenml.timers import sleep, sleep_until
    from kitaru_zenml.waits import wait


def __getattr__(name: str) -> Any:
    if name == "client":
        return importlib.import_module(f"{__name__}.client")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value
