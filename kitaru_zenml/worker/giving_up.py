"""Ending a run that cannot be continued: FAILED in ZenML, with the failure artifact, the reason, and a closed leg in the journal.

It is done under the run's lease, so that nobody executes the run meanwhile, and in an order that may be cut off anywhere: whoever looks
at the run next finds it unended and does it again.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Literal

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse, PipelineRunUpdate

from kitaru_zenml import codec, leg
from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.errors import JournalGap, RunFinished, RunGivenUp
from kitaru_zenml.journal.due import leave_hint
from kitaru_zenml.journal.journal import Journal, Snapshot, new_nonce
from kitaru_zenml.journal.lease import HeldLease, take_lease
from kitaru_zenml.journal.records import Failure, LegClosedEvent, chain_root
from kitaru_zenml.options import FlowOptions
from kitaru_zenml.runs import PARENT, artifact_store_of, find_run, flow_options


def give_up(run_id: str, why: str, watched: tuple[int, int] | None = None) -> None:
    """End a run whose process dies again and again, or whose failure ZenML does not show.

    Raises:
        RunIsLeased: If somebody executes it after all.
        RunFinished: If it has ended.
    """
    run = find_run(run_id)
    journal = Journal(open_store(artifact_store_of(run)), str(run.id))
    _end(run, journal, RunGivenUp(str(run.id), why), "found dead", watched)


def fail_unless_closed(run_id: str, error: BaseException) -> None:
    """End a run that an error keeps from being continued, unless its leg has closed: then the error is the flow's own, and told.

    Raises:
        RunIsLeased: If somebody else executes it.
        RunFinished: If it has ended otherwise.
    """
    run = find_run(run_id)
    journal = Journal(open_store(artifact_store_of(run)), str(run.id))
    newest = max((lease.epoch for lease in journal.leases()), default=0)
    if run.status == ExecutionStatus.FAILED and _failure_told(_load(journal), since=newest) is not None:
        return
    _end(run, journal, error, "raised", None)


def _end(
    run: PipelineRunResponse,
    journal: Journal,
    error: BaseException,
    ending: Literal["raised", "found dead"],
    watched: tuple[int, int] | None,
) -> None:
    options = flow_options(run) or FlowOptions()
    lease = take_lease(journal, purpose="give up", lapse_seconds=options.lapse_seconds, watched=watched)
    try:
        run = find_run(run.id)
        if run.status.is_finished and run.status != ExecutionStatus.FAILED:
            raise RunFinished(str(run.id), run.status.value)
        snapshot = _load(journal)
        died = max((held.epoch for held in journal.leases() if held.purpose not in ("settle", "give up")), default=lease.epoch)
        failure = _failure_told(snapshot, since=died)
        if failure is not None:
            error, ending = codec.decode_failure(failure), "raised"  # it has failed; only ZenML does not show it
        leg.report_failure(run, journal, died, ending, error, snapshot=snapshot or Snapshot())
        if failure is None and snapshot is not None:
            _close(journal, snapshot, lease, error)
        lease.check()
        _publish(run, str(error))
    finally:
        lease.release()
    if parent := run.config.extra.get(PARENT):
        leave_hint(journal.store, str(parent), datetime.now(UTC))  # it may wait for this run


def _load(journal: Journal) -> Snapshot | None:
    """What of the journal can be read; `None` if events are missing, so that none can be appended."""
    try:
        return journal.load(on_corrupt=lambda _: None)
    except JournalGap:
        return None


def _failure_told(snapshot: Snapshot | None, since: int) -> Failure | None:
    """The failure with which a leg of this epoch or later has closed."""
    close = snapshot.last_close if snapshot is not None else None
    return close.failure if close is not None and close.status == "failed" and close.epoch >= since else None


def _close(journal: Journal, snapshot: Snapshot, lease: HeldLease, error: BaseException) -> None:
    covered = {key for event in snapshot.events if isinstance(event, LegClosedEvent) for key in event.covers}
    covers = {key: sha for key, sha in snapshot.hashes.items() if key not in covered}
    previous = snapshot.last_close.root if snapshot.last_close is not None else ""
    journal.append(
        LegClosedEvent(
            nonce=new_nonce(), run_id=journal.run_id, epoch=lease.epoch, at=datetime.now(UTC), status="failed",
            failure=codec.encode_failure(error), covers=covers, previous_root=previous, root=chain_root(previous, covers),
        )
    )  # fmt: skip


def _publish(run: PipelineRunResponse, reason: str) -> None:
    if not run.status.is_finished:
        update = PipelineRunUpdate(status=ExecutionStatus.FAILED, status_reason=reason[: leg.REASON])
        Client().zen_store.update_run(run.id, update)
