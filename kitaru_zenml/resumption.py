"""The verbs that continue a run: resume, and settle for a step in doubt.

Resume takes the lease first and hands it to the leg that it starts, so that two resumes, or a resume and a live executor, never both
touch the run's status in ZenML. Everything it writes names exact paths and generations: done twice, it does the same.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse, PipelineRunUpdate

from kitaru_zenml import codec, leg
from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.errors import (
    AmbiguousStep,
    ForkIncomplete,
    KitaruError,
    NoJournal,
    RunFinished,
    StepInDoubt,
    StepNotFound,
)
from kitaru_zenml.inputs import reference_digest
from kitaru_zenml.journal.journal import Journal, Snapshot, new_nonce
from kitaru_zenml.journal.lease import HeldLease, take_lease
from kitaru_zenml.journal.records import (
    Lease,
    Reopened,
    RetryEvent,
    RunInfo,
    StartedMarker,
    StepRecord,
    seal,
    step_name,
)
from kitaru_zenml.options import FlowOptions, OnDrift
from kitaru_zenml.runs import PARENT, RunHandle, artifact_store_of, find_run, flow_options, open_journal, run_stack

logger = logging.getLogger("kitaru_zenml")


def resume(
    run: str | UUID,
    *,
    on_drift: OnDrift | None = None,
    takeover: bool = False,
    retry: Sequence[str] = (),
    on_wait: Callable[[Lease, float], None] | None = None,
    wait: bool = True,
    watched: tuple[int, int] | None = None,
) -> RunHandle[Any]:
    """Continue a run in the same ZenML pipeline run; see `Flow.resume`.

    Args:
        run: Id, unambiguous prefix or name.
        on_drift: For this leg; the flow's setting by default.
        takeover: Supersede an executor that is alive.
        retry: Display names or paths of failed steps to run again besides those that ended the run.
        on_wait: Told the lease and the seconds left while waiting for a dead holder's lease to lapse.
        wait: Watch a holder that may be dead until its lease has lapsed; else only one that is known to be gone is superseded, and a
            remote orchestrator's run is not waited for.
        watched: A lease that the caller has seen lapse; see `take_lease`.
    """
    leg.warm_up()
    found = find_run(run)
    if found.status in (ExecutionStatus.COMPLETED, ExecutionStatus.STOPPED, ExecutionStatus.CACHED):
        raise RunFinished(str(found.id), found.status.value)
    options = flow_options(found)
    journal = Journal(open_store(artifact_store_of(found)), str(found.id))
    if options is None:
        raise NoJournal(str(found.id), journal.store.uri)
    lease = take_lease(
        journal, purpose="resume", lapse_seconds=options.lapse_seconds, takeover=takeover, wait=wait, on_wait=on_wait,
        watched=watched,
    )  # fmt: skip
    try:
        found = find_run(found.id)  # as it is now that nobody else changes it
        if found.status in (ExecutionStatus.COMPLETED, ExecutionStatus.STOPPED):
            raise RunFinished(str(found.id), found.status.value)
        snapshot = journal.load()
        if snapshot.fork is None and found.original_run is not None:
            raise ForkIncomplete(str(found.id), str(found.original_run.id))
        if not journal.is_cancelled():  # to end it, no doubt must be settled and nothing is tried again
            refuse_doubt(snapshot, str(found.id))
            _reopen(journal, snapshot, lease, on_drift, retry)
        found_dead = found.status == ExecutionStatus.RUNNING
        if found_dead and snapshot.info is not None and "/" not in snapshot.current():
            leg.report_failure(found, journal, lease.epoch - 1, "found dead", snapshot=snapshot)
        return _continue(found, lease, snapshot, detached=not wait)
    except BaseException:
        lease.release()
        raise


def _continue(run: PipelineRunResponse, lease: HeldLease, snapshot: Snapshot, detached: bool) -> RunHandle[Any]:
    never_began = run.status in (ExecutionStatus.INITIALIZING, ExecutionStatus.PROVISIONING) and (
        snapshot.info is None or not run.orchestrator_run_id
    )
    run = run if never_began else _to_resuming(run)
    make_importable(snapshot.info or _parents_info(run))
    stack = run_stack(run)
    assert run.snapshot is not None
    with leg.reporting(lambda _: None, handed=(lease, snapshot)) as report:
        if leg.runs_in_process(stack):
            leg.run_in_process(run.snapshot, run, stack)
        else:
            lease.release()
            stack.orchestrator.resume_run(snapshot=run.snapshot, run=run, stack=stack, force_async=detached)
    if report.error is not None:
        raise report.error
    return go_on(RunHandle(run.id, report.summary), report)


def go_on(handle: RunHandle[Any], report: leg.Report) -> RunHandle[Any]:
    """Resume a run at once that suspended while what it waited for arrived: nobody else may have noticed."""
    return resume(handle.id) if report.goes_on else handle


def _to_resuming(run: PipelineRunResponse) -> PipelineRunResponse:
    """Through ZenML's legal transitions: a run that was killed is still `running` there and fails first."""
    store = Client().zen_store
    on_the_way = {
        ExecutionStatus.INITIALIZING, ExecutionStatus.PROVISIONING, ExecutionStatus.QUEUED, ExecutionStatus.RUNNING,
    }  # fmt: skip
    if (
        run.status == ExecutionStatus.INITIALIZING and not run.orchestrator_run_id
    ):  # killed before a runner took it: now or never
        run = store.update_run(run.id, PipelineRunUpdate(orchestrator_run_id=str(uuid4())))
    if run.status in on_the_way:
        run = store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.FAILED))
    if run.status in (ExecutionStatus.FAILED, ExecutionStatus.PAUSED):
        run = store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.RESUMING))
    return Client().get_pipeline_run(run.id)


def _parents_info(run: PipelineRunResponse) -> RunInfo | None:
    """What the parent of a child run that never began executes."""
    parent = run.config.extra.get(PARENT)
    return Journal(open_store(artifact_store_of(run)), str(parent)).info() if parent else None


def make_importable(info: RunInfo | None) -> None:
    """Look for the flow where it was imported from, if that is on this machine and its module is not importable as it is."""
    if info is None:
        return
    module = info.source.rpartition(".")[0]
    root = Path(info.source_root)
    if module not in sys.modules and info.source_root and root.is_dir() and str(root) not in sys.path:
        sys.path.append(str(root))


# --- failed steps --------------------------------------------------------------------------------------------------------


def _reopen(journal: Journal, snapshot: Snapshot, lease: HeldLease, on_drift: OnDrift | None, retry: Sequence[str]) -> None:
    """Let the failures that ended the run, and those named, be tried again."""
    current = snapshot.current()
    failed = {path: r for path, r in current.items() if r.failure is not None}
    named = [find_step(snapshot, journal.run_id, step).path for step in retry]
    close = snapshot.last_close
    ending = list(close.failed_paths) if close is not None and close.status == "failed" else []
    wanted = {p for p in {*ending, *named} if p in failed}
    paths = {p for p in failed if any(p == w or p.startswith(w + "/") or w.startswith(p + "/") for w in wanted)}
    if doubtful := sorted(p for p in paths if failed[p].at_most_once and p not in named):
        if not set(ending) - {p for p in ending if p in failed and failed[p].at_most_once}:
            record = failed[doubtful[0]]
            raise StepInDoubt(journal.run_id, record.display, record.started_at)
        paths -= set(doubtful)
    unknown = close is not None and close.status == "failed" and not ending and not named and failed
    if unknown:
        names = ", ".join(sorted(r.display for r in failed.values())[:5])
        logger.warning(
            "run %s: the exception that ended it does not name a failed step, so the failures it holds (%s) are replayed; "
            "to try one again: `kitaru resume %s --retry STEP`", journal.run_id, names, journal.run_id,
        )  # fmt: skip
    if not paths and on_drift is None:
        return
    event = RetryEvent(
        nonce=new_nonce(), run_id=journal.run_id, epoch=lease.epoch, at=datetime.now(UTC), on_drift=on_drift,
        reopened=tuple(Reopened(path=p, generation=failed[p].generation + 1) for p in sorted(paths)),
    )  # fmt: skip
    journal.append(event)
    snapshot.events.append(event)


def find_step(snapshot: Snapshot, run_id: str, step: str) -> StepRecord:
    """The current record of a step by its display name or path, or by a suffix of it that is unambiguous.

    Raises:
        StepNotFound: With near names.
        AmbiguousStep: If it fits several.
    """
    import difflib

    idle = snapshot.not_asked_for()
    records = [r for r in snapshot.current().values() if r.object_key not in idle]
    exact = [r for r in records if step in (r.path, r.display)]
    fits = exact or [r for r in records if r.display.endswith("/" + step)] or [r for r in records if r.name == step]
    if len(fits) == 1:
        return fits[0]
    if fits:
        names = {r.display for r in fits}
        raise AmbiguousStep(run_id, step, sorted(names if len(names) == len(fits) else (r.path for r in fits)))
    displays = sorted(r.display for r in records if r.path != "/")
    raise StepNotFound(run_id, step, difflib.get_close_matches(step, displays, n=5, cutoff=0.4))


# --- steps in doubt ------------------------------------------------------------------------------------------------------


def in_doubt(snapshot: Snapshot) -> list[StartedMarker]:
    """At-most-once steps that were started and have no outcome, and none around them has one."""
    current, opened = snapshot.current(), snapshot.generations
    return [
        m
        for m in snapshot.markers.values()
        if m.scope.path not in current
        and m.generation == opened.get(m.scope.path, 0)
        and not any(s.path in current for s in m.scopes)
    ]


def refuse_doubt(snapshot: Snapshot, run_id: str) -> None:
    """Refuse to go on past a step in doubt.

    Raises:
        StepInDoubt: For the first one.
    """
    for marker in in_doubt(snapshot):
        raise StepInDoubt(run_id, marker.display, marker.started_at)


def settle(run: str | UUID, step: str, *, value: Any = None, retry: bool = False, takeover: bool = False) -> None:
    """Say what happened to an at-most-once step whose outcome is unknown; then `resume` the run.

    Args:
        run: Id, unambiguous prefix or name.
        step: The step's display name or path.
        value: What it returned: it took effect.
        retry: It did not take effect: the next resume runs it. Then `value` does not count.
        takeover: Supersede an executor that is alive.

    Raises:
        StepNotFound: If no step of that name is in doubt.
        RunIsLeased: If another process executes the run.
        NotDurableError: If the value cannot be stored.
    """
    found = find_run(run)
    journal = open_journal(found)
    options = flow_options(found) or FlowOptions()
    lease = take_lease(journal, purpose="settle", lapse_seconds=options.lapse_seconds, takeover=takeover, wait=True)
    try:
        snapshot = journal.load()
        run_id = str(found.id)
        doubtful = {m.display: m for m in in_doubt(snapshot)}
        failed = {r.display: r for r in snapshot.current().values() if r.at_most_once and r.failure is not None}
        candidates: list[StartedMarker | StepRecord] = [*doubtful.values(), *failed.values()]
        about = next((x for x in candidates if step in (x.display, x.scope.path)), None)
        if about is None:
            if any(step in (r.path, r.display) for r in snapshot.current().values()):  # its write was under way at the crash
                raise KitaruError(f"Step `{step}` of run {run_id} has an outcome: there is nothing to settle. Resume the run.")
            raise StepNotFound(run_id, step, sorted({*doubtful, *failed}))
        if retry:
            journal.append(
                RetryEvent(
                    nonce=new_nonce(), run_id=run_id, epoch=lease.epoch, at=datetime.now(UTC),
                    reopened=(Reopened(path=about.scope.path, generation=about.generation + 1),),
                )
            )  # fmt: skip
        elif isinstance(about, StartedMarker):
            _store_outcome(journal, snapshot, lease, options, about, value)
        else:
            raise KitaruError(
                f"Step `{step}` of run {run_id} has a recorded failure, which is its outcome. If it did not take effect, say "
                f"`kitaru settle {run_id} '{step}' --retry`."
            )
    finally:
        lease.release()


def _store_outcome(
    journal: Journal, snapshot: Snapshot, lease: HeldLease, options: FlowOptions, marker: StartedMarker, value: Any
) -> None:
    encoded = codec.encode_value(
        value, step=marker.scope.name, inline_limit=max(options.inline_limit, 1 << 30), folder=lambda: "", materializers=None
    )
    scope, number = marker.scope, 1 + max((r.number for r in snapshot.records.values()), default=-1)
    record = StepRecord(
        nonce=new_nonce(), run_id=journal.run_id, epoch=lease.epoch, path=scope.path, name=scope.name, ordinal=scope.ordinal,
        key=scope.key, equal=scope.equal, kind=scope.kind, generation=marker.generation, number=number, digest=scope.digest,
        turn=scope.turn, scopes=marker.scopes, outcome=encoded.value, outcome_digest=reference_digest(encoded.tree),
        at_most_once=True, metadata={"settled": True}, started_at=marker.started_at, ended_at=datetime.now(UTC),
    )  # fmt: skip
    theirs = journal.store.create(step_name(journal.run_id, record.object_key), seal(record))
    if theirs is not None:
        raise KitaruError(f"Step `{marker.display}` of run {journal.run_id} has an outcome by now. Resume the run.")
