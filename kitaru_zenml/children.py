"""Child runs: a flow started inside a flow is a durable run of its own, and `gather_runs` joins several without holding compute.

A child is a top-level ZenML run (ZenML's own child runs cannot be resumed alone), linked to its parent by journal, tag and
configuration. Its name in ZenML comes from the parent's step that started it, and ZenML keeps run names unique: so it is started once,
whoever dies when. On a local orchestrator the parent's process executes its children, a few at once; else their orchestrator does.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from zenml.client import Client
from zenml.enums import ExecutionStatus

from kitaru_zenml import codec
from kitaru_zenml.drivers import SyncCaller, drive
from kitaru_zenml.engine import Call
from kitaru_zenml.errors import ChildRunFailed, RunCancelled, RunFinished, RunIsLeased
from kitaru_zenml.identity import HERE, Here
from kitaru_zenml.inputs import digest_inputs
from kitaru_zenml.journal.records import CancelRequest, OpenWait, StepRecord, WaitKind
from kitaru_zenml.options import StepOptions
from kitaru_zenml.runs import PARENT, RunHandle, find_run, open_journal, result_of, successor_of
from kitaru_zenml.suspension import Arrival, await_in_run, grace_passed

if TYPE_CHECKING:
    from kitaru_zenml.execution import Execution
    from kitaru_zenml.flows import Flow

logger = logging.getLogger("kitaru_zenml")
KIND = "run"  # of the step that starts a child
_LOOK_EVERY = 1.0  # seconds between two looks at children that others execute


# --- start ---------------------------------------------------------------------------------------------------------------


def start_child(flow: Flow[Any, Any], here: Here, args: Sequence[Any], kwargs: dict[str, Any]) -> RunHandle[Any]:
    """Start a flow as a child of the run that the code is in; on a replay, find the one that was started."""
    bound = inspect.signature(flow.__wrapped__).bind(*args, **kwargs)
    bound.apply_defaults()
    call = Call(flow.name, digest_inputs(bound.arguments), StepOptions(), kind=KIND, returns=dict)

    def begin() -> dict[str, str]:
        inside = HERE.get()
        assert inside is not None and inside.step is not None
        name = f"{flow.name}-{inside.step.idempotency_key[:16]}"
        run, _ = flow.create_run(name, args, kwargs, parent=here.execution.run_id)
        return {"run": str(run.id)}

    started = drive(here.execution.engine.call(call, here, SyncCaller()), here.execution.store, flow.name, begin)
    handle: RunHandle[Any] = RunHandle(started["run"])
    here.execution.children.see_to(handle.id)
    return handle


class Children:
    """The child runs of a leg, as far as this process executes them: a few at once, each in a thread of its own."""

    def __init__(self, at_once: int, records: Iterable[StepRecord]) -> None:
        self.started = [id for record in records if record.kind == KIND and (id := _child_of(record)) is not None]
        self._at_once = at_once
        self._pool: ThreadPoolExecutor | None = None
        self._here: set[str] = set()  # queued or executing in this process
        self._lock = threading.Lock()

    def see_to(self, run_id: str) -> None:
        """Execute a child, unless it has ended or somebody else does."""
        with self._lock:
            if run_id not in self.started:
                self.started.append(run_id)
            if run_id in self._here:
                return
            self._here.add(run_id)
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._at_once, thread_name_prefix="kitaru-child")
        # A context of its own: a child knows nothing of the run that started it.
        self._pool.submit(Context().run, self._execute, run_id)

    def any_here(self, run_ids: Iterable[str]) -> bool:
        """Whether this process executes one of these runs, or will."""
        with self._lock:
            return not self._here.isdisjoint(run_ids)

    def release(self) -> None:
        """The leg ends. What executes or is queued here goes on, in a process that stays for it."""
        if self._pool is not None:
            self._pool.shutdown(wait=False)

    def _execute(self, run_id: str) -> None:
        from kitaru_zenml.resumption import resume

        try:
            run = Client().get_pipeline_run(run_id, allow_name_prefix_match=False)
            # What failed is tried again by a person, and what is suspended goes on when its answer is there.
            if not run.status.is_finished and run.status != ExecutionStatus.PAUSED:
                resume(run_id)
        except (RunIsLeased, RunFinished, RunCancelled) as ended:
            logger.debug("child run %s: %s", run_id, ended)
        except Exception as error:  # recorded by the child's own run; the parent gets it when it joins
            logger.warning("child run %s ended with %s: %s", run_id, type(error).__name__, error)
        finally:
            with self._lock:
                self._here.discard(run_id)


def _child_of(record: StepRecord) -> str | None:
    data = getattr(record.outcome, "data", None)
    return data.get("run") if isinstance(data, dict) else None


def cancel_children(run_ids: Sequence[str], request: CancelRequest) -> None:
    """Let the children of a cancelled run stop too, and wait until they have. A fork leaves those of its origin alone."""
    from kitaru_zenml.client import cancel

    def stop(run_id: str) -> None:
        try:
            if find_run(run_id).config.extra.get(PARENT) != request.run_id:
                return
            cancel(run_id, f"its parent was cancelled{f': {request.reason}' if request.reason else ''}")
        except RunFinished:
            pass
        except Exception as error:
            logger.warning("child run %s could not be cancelled: %s. Try `kitaru cancel %s`.", run_id, error, run_id)

    with ThreadPoolExecutor(8, thread_name_prefix="kitaru-cancel") as pool:
        list(pool.map(lambda run_id: Context().run(stop, run_id), run_ids))


# --- join ----------------------------------------------------------------------------------------------------------------


def gather_runs(*handles: Any, return_exceptions: bool = False, name: str = "gather_runs") -> Any:
    """The results of child runs, in the order of the handles; the parent suspends until all have ended.

    Returns a list; in an async flow, an awaitable of it. A child that failed and was corrected by a fork that completed counts with the
    fork's result.

    Args:
        *handles: Of the runs, one by one or as one iterable.
        return_exceptions: Put a `ChildRunFailed` in the place of a failed child's result, instead of raising the first.
        name: Of the step that it becomes.

    Raises:
        ChildRunFailed: If a child failed or was stopped; it names the child's own exception. `kitaru resume` of the parent looks at the
            children again.
        NotInRun: Outside a flow.
    """
    given = list(handles[0]) if len(handles) == 1 and not isinstance(handles[0], RunHandle) else list(handles)
    ids = tuple(handle.id for handle in given)
    joined = await_in_run(Join(ids, return_exceptions), name, {"runs": list(ids), "return_exceptions": return_exceptions})
    if asyncio.iscoroutine(joined):
        return _results_async(joined)
    return _results(joined)


async def _results_async(joined: Any) -> list[Any]:
    entries = await joined
    return await asyncio.to_thread(_results, entries)


def _results(entries: list[dict[str, Any]]) -> list[Any]:
    return [_result(entry) for entry in entries]


def _result(entry: dict[str, Any]) -> Any:
    if entry.get("failure") is not None:
        return _failed(entry)
    if "value" in entry:
        return entry["value"]
    run = find_run(entry["run"])  # of a kind that only its own materializer can store
    return result_of(run, open_journal(run))


def _failed(entry: dict[str, Any]) -> ChildRunFailed:
    return ChildRunFailed(entry["run"], entry["status"], entry["failure"]["type"], entry["failure"]["message"])


@dataclass(frozen=True)
class Join:
    """A `suspension.Waiting` for the end of child runs."""

    runs: tuple[str, ...]
    return_exceptions: bool
    kind: WaitKind = "join"
    every: float = _LOOK_EVERY

    def details(self, now: datetime) -> dict[str, Any]:
        """See `suspension.Waiting`."""
        return {"runs": self.runs}

    def arrived(self, wait: OpenWait, execution: Execution) -> Arrival | None:
        """See `suspension.Waiting`."""
        if execution.children.any_here(self.runs):
            return None
        ended = [_ended(run_id) for run_id in self.runs]
        if any(entry is None for entry in ended):
            return None
        entries = [entry for entry in ended if entry is not None]
        failed = next((e for e in entries if e.get("failure") is not None), None)
        if failed is not None and not self.return_exceptions:
            return Arrival(error=_failed(failed))
        return Arrival(entries)

    def give_back(self, arrival: Arrival, execution: Execution) -> None:
        """See `suspension.Waiting`: it is there for the next look all the same."""

    def suspends(self, wait: OpenWait, waited: float, execution: Execution) -> bool:
        """See `suspension.Waiting`: as long as children execute here, their process is needed anyway."""
        return not execution.children.any_here(self.runs) and grace_passed(waited, None, execution)


def _ended(run_id: str) -> dict[str, Any] | None:
    """How a child ended, with its result; `None` if it has not."""
    run = Client().get_pipeline_run(UUID(run_id), allow_name_prefix_match=False)
    if run.status == ExecutionStatus.COMPLETED:
        return _completed(run_id, run)
    if not run.status.is_finished:
        return None
    corrected = successor_of(run)
    if corrected is not None:
        logger.info(
            "child run %s ended as %s; its fork %s completed and counts instead", run_id, run.status.value, corrected.id
        )
        return _completed(run_id, corrected)
    close = open_journal(run).last_close() if run.status == ExecutionStatus.FAILED else None
    failure = close.failure if close is not None and close.failure is not None else None
    shown = (
        {"type": failure.type, "message": failure.message} if failure else {"type": "", "message": f"it is {run.status.value}"}
    )
    return {"run": run_id, "status": run.status.value, "failure": shown}


def _completed(child: str, run: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"run": str(run.id), "status": "completed"}
    if str(run.id) != child:
        entry["instead_of"] = child
    value = result_of(run, open_journal(run))
    try:
        codec.to_tree(value)
    except (codec.Unencodable, RecursionError):
        return entry  # fetched from the child when it is needed
    return {**entry, "value": value}
