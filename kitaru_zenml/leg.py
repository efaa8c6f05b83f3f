"""One leg of a run inside ZenML: takes the lease where ZenML calls the flow's entrypoint, and guards what ZenML publishes after it.

ZenML's runner publishes FAILED or COMPLETED from its own finalizer, also for an executor that was superseded. So its publishing is
fenced here: nothing is published by a process that does not hold the lease, and never before lineage is drained (ZenML takes no
steps on an ended run). On a local orchestrator the runner is ours to make, one a run, so that runs in threads share nothing.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID, uuid4

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.execution.pipeline.dynamic.run_context import DynamicPipelineRunContext
from zenml.execution.pipeline.dynamic.runner import DynamicPipelineRunner, RunPaused, _WaitConditionAborted
from zenml.integrations.registry import integration_registry
from zenml.models import PipelineRunResponse, PipelineRunUpdate, PipelineSnapshotResponse
from zenml.orchestrators.local.local_orchestrator import LocalOrchestrator
from zenml.stack import Stack
from zenml.utils import source_utils

import kitaru_zenml
from kitaru_zenml import progress
from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.codec import encode_failure, paths_on_chain
from kitaru_zenml.conditions import Conditions, close_pending
from kitaru_zenml.errors import (
    ForkIncomplete,
    KitaruError,
    LeaseLost,
    RunIsLeased,
    StoreUnavailable,
    WrongArtifactStore,
)
from kitaru_zenml.execution import Ended, Execution, LegSummary, input_trees
from kitaru_zenml.inputs import canonical
from kitaru_zenml.journal.due import leave_hint, remove_hint
from kitaru_zenml.journal.journal import Journal, Snapshot, new_nonce
from kitaru_zenml.journal.lease import HeldLease, is_gone, take_lease
from kitaru_zenml.journal.records import Beat, InFlight, RetryEvent, RunInfo, display_path
from kitaru_zenml.lineage.failure import FailureReport, build_report, register_failure
from kitaru_zenml.lineage.materializer import ZenMLMaterializers
from kitaru_zenml.lineage.recorder import Recorder
from kitaru_zenml.options import OnDrift
from kitaru_zenml.runs import PARENT, artifact_store_of, ensure_source_root

if TYPE_CHECKING:
    from kitaru_zenml.flows import Flow

logger = logging.getLogger("kitaru_zenml")
DRAIN_PATIENCE = 600.0  # seconds that the end of a leg waits for a ZenML server that is down
REASON = 255  # characters that ZenML takes for a status
LET_GO_PATIENCE = 1.0  # seconds that an interrupted leg waits for it


@dataclass
class Report:
    """What the caller of `.run()` or `.resume()` learns of the leg, when it ran in this process."""

    on_started: Callable[[UUID], None]
    error: BaseException | None = None
    handed: tuple[HeldLease, Snapshot] | None = None  # taken by resume, so that nobody comes in between
    summary: LegSummary | None = None
    goes_on: bool = False  # it suspended, and what it waited for has come since


_REPORT: ContextVar[Report | None] = ContextVar("kitaru_report", default=None)


@contextlib.contextmanager
def reporting(on_started: Callable[[UUID], None], handed: tuple[HeldLease, Snapshot] | None = None) -> Iterator[Report]:
    """Collect how a leg that runs in this context ends."""
    report = Report(on_started, handed=handed)
    token = _REPORT.set(report)
    try:
        yield report
    finally:
        _REPORT.reset(token)


_first_use = threading.Lock()
_is_warm = False


def warm_up() -> None:
    """Let ZenML fill its registries and open its store in one thread: what it does on first use is not safe in several.

    Only the first flow of a process takes the lock.
    """
    global _is_warm
    if _is_warm:
        return
    with _first_use:
        if not _is_warm:
            ensure_source_root()
            integration_registry.activate_integrations()
            stack = Client().active_stack
            stack.artifact_store.path  # noqa: B018  (loads the flavor)
            _is_warm = True


# --- ZenML's runner, made by us where it runs in this process -------------------------------------------------------------


def runs_in_process(stack: Stack) -> bool:
    """Whether the stack's orchestrator runs a pipeline in the calling process."""
    return type(stack.orchestrator) is LocalOrchestrator


def run_in_process(snapshot: PipelineSnapshotResponse, run: PipelineRunResponse, stack: Stack) -> None:
    """What `LocalOrchestrator.submit_dynamic_pipeline` does, with nothing shared between runs in threads of one process."""
    orchestrator = copy.copy(stack.orchestrator)
    orchestrator._orchestrator_run_id = run.orchestrator_run_id or str(uuid4())  # type: ignore[attr-defined]
    orchestrator._active_snapshot = snapshot
    _InProcessRunner(snapshot=snapshot, run=run, orchestrator=orchestrator).run_pipeline()


class _StepRunsByName(dict[str, Any]):
    """ZenML's runner loads every step run of a run that it continues; it needs only those of isolated steps, one at a time."""

    def __init__(self, run: PipelineRunResponse) -> None:
        super().__init__()
        self._run = run

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self:
            found = Client().list_run_steps(pipeline_run_id=self._run.id, name=name, exclude_retried=True, hydrate=True)
            if not found.items:
                return default
            self[name] = found.items[0]
        return self[name]


class _ContinuedRun(PipelineRunResponse):
    """A run whose steps are looked up one by one."""

    @property
    def steps(self) -> dict[str, Any]:
        return _StepRunsByName(self)


class _InProcessRunner(DynamicPipelineRunner):
    def _prepare_run(self, run: PipelineRunResponse | None) -> tuple[PipelineRunResponse, str]:
        if run is None or not run.orchestrator_run_id:
            return super()._prepare_run(run)
        return _ContinuedRun.model_construct(**dict(run)), run.orchestrator_run_id

    def _load_existing_child_runs(self) -> dict[str, Any]:
        return {}  # our child runs are runs of their own


# --- the leg -------------------------------------------------------------------------------------------------------------


def execute(flow: Flow[Any, Any], parameters: dict[str, Any]) -> None:
    """Run one leg of the flow's run that ZenML is executing.

    Raises:
        Exception: What ended the run, for ZenML to publish; nothing if this process is not, or no longer, the run's executor.
    """
    context = DynamicPipelineRunContext.get()
    assert context is not None, "ZenML calls the entrypoint within a run"
    run, runner = context.run, context.runner
    report = _REPORT.get()
    fence = _Fence(runner)
    try:
        with progress.shown(flow.name, str(run.id)) as shown:
            ended = _run_leg(flow, parameters, run, runner, fence, report, shown)
    except (RunIsLeased, LeaseLost) as error:
        ended = Ended(error=error)
        fence.close()
    if report is not None and ended.status != "paused":
        report.error = ended.error
    if ended.interrupted:
        fence.let_go()
    if (ended.status == "paused" or ended.cancelled) and not fence.closed:
        fence.conclude()
        raise RunPaused if ended.status == "paused" else _WaitConditionAborted(str(ended.error))
    if ended.error is not None and not fence.closed:
        ended.error.add_note(
            f"Run {run.id} of flow `{flow.name}` ended here. Look at it with `kitaru show {run.id}`, go on with `kitaru resume {run.id}`."
        )
        raise ended.error
    if ended.error is not None:
        logger.warning("%s", ended.error)


def _run_leg(
    flow: Flow[Any, Any],
    parameters: dict[str, Any],
    run: PipelineRunResponse,
    runner: DynamicPipelineRunner,
    fence: _Fence,
    report: Report | None,
    shown: progress.RunProgress | None,
) -> Ended:
    artifact_store = runner._stack.artifact_store
    journal = Journal(open_store(artifact_store), str(run.id))
    handed = report.handed if report else None
    if handed is not None and handed[0].journal.run_id == str(run.id):
        lease, snapshot = handed
        journal = lease.journal
    else:
        lease = take_lease(journal, purpose="run", lapse_seconds=flow.options.lapse_seconds, wait=True)
        snapshot = journal.load()
    try:
        if snapshot.fork is None and not snapshot.records and run.original_run is not None:
            raise ForkIncomplete(str(run.id), str(run.original_run.id))
        info = journal.begin(run_info(flow, parameters, run, journal))
        if info.artifact_store != journal.store.uri:
            raise WrongArtifactStore(str(run.id), info.artifact_store, journal.store.uri)
        recorder = Recorder(
            run=run,
            store=journal.store,
            artifact_store_id=artifact_store.id,
            artifact_store_root=artifact_store.path,
            flow=flow.name,
            reused=snapshot.reused,
        )
        execution = Execution(
            journal=journal, lease=lease, snapshot=snapshot, options=flow.options, on_drift=_drift_choice(snapshot, lease, flow),
            recorder=recorder, materializers=ZenMLMaterializers(artifact_store), on_progress=shown.note if shown else None,
            on_cancel=flow.on_cancel,
        )  # fmt: skip
        conditions = Conditions(run, execution.inbox, lambda: execution.engine.open_waits, execution.engine.look)
        execution.board = conditions
        recorder.watch(lambda: execution.engine.activity)
        recorder.start()
        if snapshot.records:
            given = {*snapshot.reused, *snapshot.overridden}  # shown when a call takes them
            known = (snapshot.records.keys() - given) | snapshot.asked_for()
            in_order = sorted((snapshot.records[key] for key in known), key=lambda record: record.number)
            recorder.reconcile_later([record.object_key for record in in_order if record.is_shown])
        if report is not None:
            report.on_started(run.id)
        snapshot.records.clear()  # the engine holds what it needs until it is delivered
        ended = execution.run(flow.__wrapped__, parameters, flow.name, inspect.signature(flow.__wrapped__).return_annotation)
        fence.guard(execution, recorder, conditions, ended, info.parent)
        if shown is not None:
            shown.ended(ended.error)
        if report is not None:
            report.summary = execution.summary(
                ended, code_changed=bool(info.code) and info.code != code_digest(flow.__wrapped__)
            )
        return ended
    except BaseException:
        lease.release()
        raise


def _drift_choice(snapshot: Snapshot, lease: HeldLease, flow: Flow[Any, Any]) -> OnDrift:
    """What the person who resumed said for this leg, else what the flow says."""
    for event in reversed(snapshot.events):
        if isinstance(event, RetryEvent) and event.on_drift and event.epoch >= lease.epoch - 1:
            return event.on_drift
    return flow.options.on_drift


def run_info(flow: Flow[Any, Any], parameters: dict[str, Any], run: PipelineRunResponse, journal: Journal) -> RunInfo:
    """What a run executes, as any leg of it would say."""
    source = flow.resolve()
    return RunInfo(
        nonce=new_nonce(), run_id=str(run.id), flow=flow.name, source=source.import_path, source_root=source_utils.get_source_root(),
        inputs={name: canonical(value, []) for name, value in parameters.items()}, code=code_digest(flow.__wrapped__),
        artifact_store=journal.store.uri, parent=flow.configuration.extra.get(PARENT), kitaru_version=kitaru_zenml.__version__,
        created_at=run.created.replace(tzinfo=UTC) if run.created else datetime.now(UTC),
    )  # fmt: skip


def code_digest(function: Callable[..., Any]) -> str:
    """Digest of the source file of a function, to tell whether the code changed between legs."""
    try:
        return hashlib.sha256(Path(inspect.getsourcefile(function) or "").read_bytes()).hexdigest()
    except OSError:
        return ""


class _Fence:
    """Stands before everything that ZenML's runner publishes about the run's end."""

    def __init__(self, runner: DynamicPipelineRunner) -> None:
        self.closed = False
        self._runner, self._publish, self._hooks = runner, runner._publish_run_status, runner._fire_terminal_run_hooks
        self._guard: tuple[Execution, Recorder, Conditions, Ended] | None = None
        self._concluded = False
        self._parent: str | None = None  # run that this one is a child of
        runner._publish_run_status = self._publish_run_status  # type: ignore[method-assign]
        runner._fire_terminal_run_hooks = self._fire_terminal_run_hooks  # type: ignore[method-assign]

    def close(self) -> None:
        """This process does not hold the lease: let nothing through."""
        self.closed = True

    def guard(self, execution: Execution, recorder: Recorder, conditions: Conditions, ended: Ended, parent: str | None) -> None:
        """The leg has ended; what follows is ZenML's finalizer, or `conclude`."""
        self._parent = parent
        self._guard = execution, recorder, conditions, ended
        if ended.superseded:
            self.close()
            conditions.close(suspending=False)
            recorder.close()

    def _publish_run_status(self, return_value: Any = None, exception: BaseException | None = None) -> None:
        if self.closed or self._concluded:
            return
        if self._guard is None:  # the leg never began
            self._publish(return_value=return_value, exception=exception)
            return
        self.conclude(lambda: self._publish(return_value=return_value, exception=exception))

    def let_go(self) -> None:
        """The process must end soon: leave the run as it is in ZenML, for whoever continues it."""
        if self._guard is None or self.closed:
            return
        execution, recorder, conditions, _ = self._guard
        self.close()
        conditions.close(suspending=False)
        recorder.drain(LET_GO_PATIENCE)  # what is left is found on resume
        recorder.close()
        execution.lease.release()
        leave_hint(execution.store, execution.run_id, datetime.now(UTC))
        if execution.hint is not None:
            remove_hint(execution.store, execution.hint)

    def conclude(self, publish: Callable[[], None] | None = None) -> None:
        """Drain lineage, give the run its status in ZenML, and let it go."""
        assert self._guard is not None
        execution, recorder, conditions, ended = self._guard
        self._concluded = True
        try:
            # A store that failed the run fails lineage too, which a resume completes: no use in waiting for it.
            drained = recorder.drain(5 if isinstance(ended.error, StoreUnavailable) else DRAIN_PATIENCE)
            if drained.pending:
                logger.error("run %s: %d steps are not in ZenML yet: %s", execution.run_id, drained.pending, drained.error)
            execution.lease.check()
            if ended.status == "failed" and ended.error is not None:
                report_failure(self._runner.run, execution.journal, execution.lease.epoch, "raised", ended.error)
            _patiently(lambda: _log_root(execution))
            execution.lease.check()
            if ended.status == "paused":
                _patiently(lambda: self._pause(execution, conditions))
            else:
                conditions.close(suspending=False)
                _patiently(publish or (lambda: self._stop(ended)))
                if ended.error is None or ended.cancelled:  # else a resume may continue it, and its question still stands
                    _patiently(lambda: close_pending(execution.run_id))
        except LeaseLost as lost:
            logger.warning("%s", lost)
            self.close()
            if (report := _REPORT.get()) is not None:
                report.error = lost
            return
        finally:
            recorder.close()
            execution.lease.release()
        if ended.status == "paused":
            _hint_at_news(execution)
        if execution.hint is not None:
            remove_hint(execution.store, execution.hint)
        if self._parent is not None and ended.status != "paused":
            leave_hint(execution.store, self._parent, datetime.now(UTC))  # it may wait for this run

    def _pause(self, execution: Execution, conditions: Conditions) -> None:
        goes_on = conditions.close(suspending=True)
        waits = execution.engine.open_waits
        if deadlines := [wait.deadline for wait in waits if wait.deadline is not None]:
            leave_hint(execution.store, execution.run_id, min(deadlines))
        run = Client().zen_store.get_run(UUID(execution.run_id))
        if run.status == ExecutionStatus.RUNNING:
            update = PipelineRunUpdate(status=ExecutionStatus.PAUSED, status_reason="Waiting.")
            run = Client().zen_store.update_run(run.id, update)
        self._runner._run = run
        if (report := _REPORT.get()) is not None:
            report.goes_on = goes_on

    def _stop(self, ended: Ended) -> None:
        run = Client().zen_store.get_run(self._runner.run.id)
        if not run.status.is_finished:
            update = PipelineRunUpdate(status=ExecutionStatus.STOPPED, status_reason=str(ended.error)[:REASON])
            run = Client().zen_store.update_run(run.id, update)
        self._runner._run = run

    def _fire_terminal_run_hooks(self, *args: Any, **kwargs: Any) -> None:
        if not self.closed:
            self._hooks(*args, **kwargs)


def failure_report(
    run: PipelineRunResponse,
    journal: Journal,
    epoch: int,
    ending: Literal["raised", "found dead"],
    error: BaseException | None = None,
    snapshot: Snapshot | None = None,
) -> FailureReport:
    """Why and where a leg ended; `snapshot` is the journal if it is at hand."""
    beat, snapshot = journal.beat(epoch), snapshot or journal.load()
    return build_report(
        run_id=str(run.id),
        flow=snapshot.info.flow if snapshot.info else "",
        epoch=epoch,
        at=datetime.now(UTC),
        ending=ending,
        records=snapshot.records,
        failure=encode_failure(error) if error is not None else None,
        in_flight=_cut_off(snapshot, beat) if ending == "found dead" else (),
        failed_paths=paths_on_chain(error) if error is not None else (),
        inputs_of=lambda record: input_trees(journal, record),
    )


def _cut_off(snapshot: Snapshot, beat: Beat | None) -> tuple[InFlight, ...]:
    """What was executing when a process died: by its last heartbeat, and by the records of what happened inside."""
    recorded = {record.path for record in snapshot.records.values()}
    found = {flight.path: flight for flight in (beat.in_flight if beat is not None else ()) if flight.path not in recorded}
    for record in snapshot.records.values():
        for depth, scope in enumerate(record.scopes):
            if scope.path not in recorded and scope.path not in found:
                display = display_path(record.scopes[: depth + 1])
                found[scope.path] = InFlight(path=scope.path, display=display, kind=scope.kind, started_at=record.started_at)
    return tuple(sorted(found.values(), key=lambda flight: flight.started_at))


def found_dead(run: PipelineRunResponse, journal: Journal) -> int | None:
    """The epoch of the leg whose process is gone without having ended the run; `None` if there is none."""
    leases = [lease for lease in journal.leases() if lease.purpose != "settle"]
    if run.status.is_finished or run.status.value == "paused" or not leases:
        return None
    beat = journal.beat(leases[-1].epoch)
    gone = (beat is not None and beat.released) or is_gone(leases[-1].holder)
    return leases[-1].epoch if gone else None


def report_failure(
    run: PipelineRunResponse,
    journal: Journal,
    epoch: int,
    ending: Literal["raised", "found dead"],
    error: BaseException | None = None,
    snapshot: Snapshot | None = None,
) -> None:
    """Register the failure artifact of a leg. Never in the way of what follows: the journal says the same, less handily."""
    try:
        report, store = failure_report(run, journal, epoch, ending, error, snapshot), artifact_store_of(run)
        register_failure(report, run=run, store=journal.store, artifact_store_id=store.id, artifact_store_root=store.path)
    except Exception as problem:
        logger.warning("run %s: its failure artifact could not be registered: %s", run.id, problem)


def _hint_at_news(execution: Execution) -> None:
    """What came while the leg was ending may have been looked at when the run was still leased, and its hint put off."""
    try:
        execution.inbox.refresh()
    except KitaruError as problem:
        logger.warning("run %s: its inbox cannot be read: %s", execution.run_id, problem)
    if execution.inbox.size > execution.engine.inbox_seen:
        leave_hint(execution.store, execution.run_id, datetime.now(UTC))


def _log_root(execution: Execution) -> None:
    from zenml import log_metadata

    facts: dict[Any, Any] = {"root": execution.root_hash, "epoch": execution.lease.epoch}
    log_metadata(metadata={"kitaru": facts}, run_id_name_or_prefix=execution.run_id)


def _patiently(call: Callable[[], None]) -> None:
    """Make a call to ZenML, again and again while it cannot be reached."""
    deadline, delay = time.monotonic() + DRAIN_PATIENCE, 0.5
    while True:
        try:
            return call()
        except Exception as error:
            if not is_unreachable(error):
                raise
            if time.monotonic() > deadline:
                raise KitaruError(
                    "ZenML cannot be reached, so the run's end is not shown there yet. Every step is safe in the journal; "
                    f"`kitaru resume` finishes it once ZenML answers: {error}"
                ) from error
            logger.warning("ZenML cannot be reached (%s); trying again in %.0f s", error, delay)
            time.sleep(delay)
            delay = min(delay * 2, 15)


def is_unreachable(error: BaseException) -> bool:
    """Whether an error of ZenML's client says that its server or database does not answer now."""
    import requests
    from sqlalchemy.exc import OperationalError

    said: BaseException | None = error
    while said is not None:  # the client wraps some of them in a RuntimeError
        if isinstance(said, requests.ConnectionError | requests.Timeout | OperationalError | ConnectionError):
            return True
        said = said.__cause__
    return False
