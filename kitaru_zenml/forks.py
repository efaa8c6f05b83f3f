"""Replay with overrides: a new run that reuses another run's records up to a cut, and runs the rest.

Nothing of the origin is copied or changed. The order in which a fork comes into being is the order in which a kill is safe:

1. A ZenML run that names its origin ("Replay of"). It cannot run: a leg of such a run without `fork.json` is refused.
2. A marker in the journal of each run whose objects it needs: from now on those are not deleted.
3. The overrides, as records of the fork.
4. `fork.json`, which makes it a run: killed after this, `kitaru resume` executes it.

Killed before 4, nothing has run; `kitaru delete` removes what is left.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

from zenml.client import Client
from zenml.execution.pipeline.utils import submit_pipeline
from zenml.models import PipelineRunResponse
from zenml.pipelines.dynamic.pipeline_definition import DynamicPipeline
from zenml.pipelines.run_utils import create_placeholder_run

from kitaru_zenml import codec, deletion, leg, resumption
from kitaru_zenml.errors import InvalidInput, KitaruError, NoJournal, RunBeingDeleted, StepNotFound
from kitaru_zenml.inputs import REFERENCE_FROM, reference_digest
from kitaru_zenml.journal.journal import Journal, Snapshot, new_nonce
from kitaru_zenml.journal.records import (
    Fork,
    ForkMarker,
    StepRecord,
    artifact_folder,
    blob_name,
    deletion_name,
    fork_name,
    marker_name,
    seal,
    step_name,
)
from kitaru_zenml.journal.store import ObjectNotFound
from kitaru_zenml.lineage.materializer import ZenMLMaterializers
from kitaru_zenml.options import FlowOptions
from kitaru_zenml.overrides import validated
from kitaru_zenml.runs import RunHandle, artifact_store_of, find_run, flow_options, open_journal, run_stack
from kitaru_zenml.selection import Reuse, select

if TYPE_CHECKING:
    from kitaru_zenml.flows import Flow

_STACK_ID = "ZENML_ACTIVE_STACK_ID"  # ZenML takes the active stack from here first
_on_a_stack = threading.Lock()


def replay(
    run: str | UUID,
    *,
    from_: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Any] | None = None,
    reuse: Reuse = "before",
    label: str | None = None,
    flow: Flow[Any, Any] | None = None,
) -> RunHandle[Any]:
    """Fork a run: a new run that reuses its finished steps up to a cut, and runs the rest; see `Flow.replay`.

    Args:
        run: Id, unambiguous prefix or name of the origin.
        from_: Name or path of the step to run from.
        overrides: Outcomes to take instead of what steps returned, by the steps' names or paths.
        inputs: Arguments of the flow to change.
        reuse: `before` or `unchanged`.
        label: Why, for whoever looks at the fork.
        flow: The flow to run; that of the origin by default.
    """
    leg.warm_up()
    fork = _planned(run, from_, overrides or {}, inputs or {}, reuse, label, flow)
    with _on_stack(fork.origin):
        snapshot = fork.pipeline._create_snapshot(**fork.pipeline._run_args)
    new = create_placeholder_run(snapshot=snapshot, original_run_id=fork.origin.id)
    journal = Journal(fork.journal.store, str(new.id))
    try:
        _store(fork, new, journal)
    except BaseException:
        with contextlib.suppress(Exception):
            deletion.erase(journal, fork.manifest(str(new.id)).needs)
        raise
    stack = run_stack(new)
    with leg.reporting(lambda _: None) as report:
        if leg.runs_in_process(stack):
            leg.run_in_process(snapshot, new, stack)
        else:
            submit_pipeline(snapshot=snapshot, stack=stack, placeholder_run=new)
    if report.error is not None:
        raise report.error
    return resumption.go_on(RunHandle(new.id, report.summary), report)


# --- what is to be done --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Planned:
    """A fork that can be made: everything a person said is valid."""

    origin: PipelineRunResponse
    journal: Journal
    snapshot: Snapshot
    pipeline: Flow[Any, Any]
    options: FlowOptions
    overridden: dict[str, tuple[StepRecord, Any]]  # by key: what it returned, and what is taken instead
    start: StepRecord | None
    cut: int
    reused: dict[str, dict[str, str]]
    inputs: dict[str, Any]
    reuse: Reuse
    label: str | None
    by: str

    def manifest(self, run_id: str) -> Fork:
        """What the fork's journal says of all this."""
        return Fork(
            nonce=new_nonce(), run_id=run_id, origin=str(self.origin.id), reuse=self.reuse, cut=self.cut, reused=self.reused,
            start=self.start.display if self.start else None, label=self.label, by=self.by, at=datetime.now(UTC),
            overridden={key: record.display for key, (record, _) in self.overridden.items()}, inputs=self.inputs,
        )  # fmt: skip


def _planned(
    run: str | UUID,
    from_: str | None,
    overrides: Mapping[str, Any],
    inputs: Mapping[str, Any],
    reuse: Reuse,
    label: str | None,
    flow: Flow[Any, Any] | None,
) -> _Planned:
    if reuse not in ("before", "unchanged"):
        raise ValueError(f"`reuse` is `before` or `unchanged`, not `{reuse}`")
    origin = find_run(run)
    run_id, options = str(origin.id), flow_options(origin)
    journal = open_journal(origin)
    if options is None:
        raise NoJournal(run_id, journal.store.uri)
    snapshot = journal.load()
    start = None if from_ is None else _find(snapshot, run_id, from_)
    named = [(_find(snapshot, run_id, step), value) for step, value in overrides.items()]
    flow = flow or _load_flow(origin, snapshot)
    values = {r.object_key: (r, validated(run_id, r, value, flow.__wrapped__, journal.blob)) for r, value in named}
    idle = snapshot.not_asked_for()
    answering = {r.object_key: r for r in snapshot.current().values() if r.object_key not in idle}
    selection = select(answering, start, [record for record, _ in values.values()], reuse)
    return _Planned(
        origin, journal, snapshot, _prepared(flow, origin, options, inputs), options, values, start, selection.cut,
        _holders(snapshot, run_id, selection.keys), dict(inputs), reuse, label, Client().active_user.name,
    )  # fmt: skip


def _find(snapshot: Snapshot, run_id: str, step: str) -> StepRecord:
    record = resumption.find_step(snapshot, run_id, step)
    if record.path == "/":  # the flow's own outcome: no step, and nothing comes after it
        raise StepNotFound(run_id, step)
    return record


def _holders(snapshot: Snapshot, run_id: str, keys: frozenset[str]) -> dict[str, dict[str, str]]:
    """Who really holds each record: the origin, or a run that the origin reuses itself."""
    holders: dict[str, dict[str, str]] = {}
    for key in sorted(keys, key=lambda key: snapshot.records[key].number):
        of = snapshot.reused.get(key)
        holders.setdefault(of.run_id if of else run_id, {})[key] = of.sha256 if of else snapshot.hashes[key]
    return holders


def _load_flow(origin: PipelineRunResponse, snapshot: Snapshot) -> Flow[Any, Any]:
    from kitaru_zenml.flows import Flow

    resumption.make_importable(snapshot.info)
    source = origin.snapshot.pipeline_spec.source if origin.snapshot and origin.snapshot.pipeline_spec else None
    if source is None:
        raise KitaruError(f"Run {origin.id} does not say which flow it is of. Replay it from code: `flow.replay(...)`.")
    flow = DynamicPipeline.load_from_source(source)
    if not isinstance(flow, Flow):
        raise KitaruError(f"`{source.import_path}`, which run {origin.id} is of, is not a kitaru flow any more.")
    return flow


def _prepared(
    flow: Flow[Any, Any], origin: PipelineRunResponse, options: FlowOptions, inputs: Mapping[str, Any]
) -> Flow[Any, Any]:
    """A copy of the flow with the origin's options, and its arguments but for those that change."""
    pipeline = flow.with_options(**asdict(options))
    parameters = {**(origin.config.parameters or {}), **inputs}
    try:
        pipeline.prepare(**parameters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise InvalidInput(str(origin.id), flow.name, f"{error.__cause__ or error}.".replace("\n", " ")) from error
    return pipeline


@contextlib.contextmanager
def _on_stack(origin: PipelineRunResponse) -> Iterator[None]:
    """Let ZenML take the origin's stack for the active one."""
    stack = run_stack(origin)
    if Client().active_stack_model.id == stack.id:
        yield
        return
    with _on_a_stack:
        before = os.environ.get(_STACK_ID)
        os.environ[_STACK_ID] = str(stack.id)
        try:
            yield
        finally:
            if before is None:
                del os.environ[_STACK_ID]
            else:
                os.environ[_STACK_ID] = before


# --- doing it ------------------------------------------------------------------------------------------------------------


def _store(fork: _Planned, new: PipelineRunResponse, journal: Journal) -> None:
    """Store what makes the new run a fork, in the order that the module's head argues."""
    store, manifest = journal.store, fork.manifest(str(new.id))
    for run_id in manifest.needs:
        marker = ForkMarker(nonce=new_nonce(), run_id=run_id, fork=str(new.id), at=manifest.at)
        store.create(marker_name(run_id, str(new.id)), seal(marker))
        if _exists(journal, deletion_name(run_id)):  # whoever deletes notes that first, and then looks for markers
            raise RunBeingDeleted(run_id)
    for key, (record, value) in fork.overridden.items():
        override = _override(fork, manifest, journal, key, record, value)
        store.create(step_name(str(new.id), key), seal(override))
    store.create(fork_name(str(new.id)), seal(manifest))
    journal.begin(leg.run_info(fork.pipeline, fork.pipeline._parameters, new, journal))


def _override(fork: _Planned, manifest: Fork, journal: Journal, key: str, record: StepRecord, value: Any) -> StepRecord:
    """The fork's own record of a step whose outcome a person gave."""
    encoded = codec.encode_plain(value, fork.options.inline_limit) or codec.encode_value(
        value, step=record.name, inline_limit=fork.options.inline_limit, allow_pickle=fork.options.allow_pickle,
        folder=lambda: f"{artifact_folder(journal.run_id, key)}/override",
        materializers=ZenMLMaterializers(artifact_store_of(fork.origin)),
    )  # fmt: skip
    if encoded.blob is not None:
        journal.store.create(blob_name(journal.run_id, encoded.blob[0]), encoded.blob[1])
    digest = reference_digest(encoded.tree, encoded.text) if len(encoded.text) >= REFERENCE_FROM else None
    said = {"by": manifest.by, "at": manifest.at.isoformat(), "why": manifest.label or "", "of": manifest.origin}
    return StepRecord(
        nonce=new_nonce(), run_id=journal.run_id, epoch=0, path=record.path, name=record.name, ordinal=record.ordinal, key=record.key,
        equal=record.equal, kind=record.kind, generation=record.generation, number=record.number, began=record.began,
        digest=record.digest, turn=record.turn, scopes=record.scopes, arguments=record.arguments, outcome=encoded.value,
        outcome_digest=digest, after=record.after, metadata={"override": said}, started_at=manifest.at, ended_at=manifest.at,
    )  # fmt: skip


def _exists(journal: Journal, name: str) -> bool:
    try:
        journal.store.get(name)
    except ObjectNotFound:
        return False
    return True
