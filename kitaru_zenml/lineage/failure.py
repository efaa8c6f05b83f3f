"""The failure artifact: what a person needs when a run ended badly, as a versioned artifact instead of a log in a lost pod.

`build_report` is a pure function over the journal; `register_failure` stores its result as JSON and HTML beside the run's other
artifacts and registers `<flow>.failure` in ZenML, once for each lease epoch. Reading it back needs the artifact store alone, so
this module imports ZenML only to register.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError

from kitaru_zenml.errors import CorruptRecord
from kitaru_zenml.journal.records import Failure, InFlight, StepRecord, artifact_folder
from kitaru_zenml.journal.store import ObjectNotFound, Store
from kitaru_zenml.lineage import html

if TYPE_CHECKING:
    from zenml.models import PipelineRunResponse

LAST_STEPS = 10
INPUT_LIMIT = 100_000  # characters of JSON of one input
REPORT, VIEW = "failure.json", "failure.html"

Ending = Literal["raised", "found dead"]


class FinishedStep(BaseModel):
    """A step that ended well before the run ended badly."""

    model_config = ConfigDict(frozen=True)
    display: str
    path: str
    kind: str
    number: int
    ended_at: datetime
    seconds: float


class FailingStep(BaseModel):
    """The step whose recorded failure ended the run."""

    model_config = ConfigDict(frozen=True)
    display: str
    path: str
    kind: str
    attempts: int
    inputs: dict[str, Any]
    failure: Failure


class Command(BaseModel):
    """What to type to go on from here."""

    model_config = ConfigDict(frozen=True)
    want: str
    command: str


class FailureReport(BaseModel):
    """Why and where a run ended, and how to go on."""

    model_config = ConfigDict(frozen=True, extra="ignore", ser_json_inf_nan="constants")
    v: int = 1
    run_id: str
    flow: str
    epoch: int
    at: datetime
    ending: Ending
    failure: Failure | None = None
    failing_step: FailingStep | None = None
    in_flight: tuple[InFlight, ...] = ()
    last_finished: tuple[FinishedStep, ...] = ()  # the latest first
    counts: dict[str, int] = {}
    commands: tuple[Command, ...] = ()


# --- building ------------------------------------------------------------------------------------------------------------


def build_report(
    *,
    run_id: str,
    flow: str,
    epoch: int,
    at: datetime,
    ending: Ending,
    records: Mapping[str, StepRecord],
    failure: Failure | None = None,
    in_flight: Sequence[InFlight] = (),
    failed_paths: Collection[str] = (),
    inputs_of: Callable[[StepRecord], Mapping[str, Any]] | None = None,
) -> FailureReport:
    """Describe how a run ended.

    Args:
        run_id: The run.
        flow: Name of the flow.
        epoch: The lease epoch of the leg that ended.
        at: When it ended or was found dead.
        ending: Whether an exception ended it, or its process was found dead.
        records: All records of the run by key.
        failure: The exception that ended it.
        in_flight: The steps that were executing.
        failed_paths: Paths of the recorded failures on the chain of that exception.
        inputs_of: The whole input trees of a record; without it, references are named, not followed.
    """
    current: dict[str, tuple[str, StepRecord]] = {}
    for key, record in records.items():
        if record.path != "/" and (record.path not in current or current[record.path][1].generation < record.generation):
            current[record.path] = (key, record)
    steps = [record for _, record in current.values()]
    finished = sorted((r for r in steps if r.failure is None), key=lambda r: r.number, reverse=True)
    on_chain = [record for record in steps if record.failure and record.path in failed_paths]
    passed_on = [record for record in steps if any(_let_through(outer, record) for outer in on_chain)]
    # The innermost is the cause.
    failing = max((*on_chain, *passed_on), key=lambda record: (len(record.scopes), record.number), default=None)
    last = tuple(_finished(record) for record in finished[:LAST_STEPS])

    def named_inputs(record: StepRecord) -> Mapping[str, Any]:
        def name_of(key: str) -> str | None:
            return records[key].display if key in records else None

        return {name: html.named(tree, name_of) for name, tree in record.inputs.items()}

    return FailureReport(
        run_id=run_id,
        flow=flow,
        epoch=epoch,
        at=at,
        ending=ending,
        failure=failure,
        failing_step=_failing(failing, inputs_of or named_inputs) if failing else None,
        in_flight=tuple(in_flight),
        last_finished=last,
        counts={
            "finished": len(finished),
            "failed": len(steps) - len(finished),
            "in_flight": len(in_flight),
            "retried": sum(len(record.attempts) for record in steps),
        },
        commands=_commands(run_id, failing.display if failing else last[0].display if last else None, failing is not None),
    )


def _let_through(outer: StepRecord, inner: StepRecord) -> bool:
    """Whether a step failed with just the exception that a step inside it raised."""
    a, b = outer.failure, inner.failure
    inside = inner.path.startswith(outer.path + "/")
    return inside and a is not None and b is not None and (a.type, a.message) == (b.type, b.message)


def _finished(record: StepRecord) -> FinishedStep:
    return FinishedStep(
        display=record.display,
        path=record.path,
        kind=record.kind,
        number=record.number,
        ended_at=record.ended_at,
        seconds=round((record.ended_at - record.started_at).total_seconds(), 3),
    )


def _failing(record: StepRecord, inputs_of: Callable[[StepRecord], Mapping[str, Any]]) -> FailingStep:
    assert record.failure is not None
    try:
        inputs = {name: _bounded(tree) for name, tree in inputs_of(record).items()}
    except Exception as error:  # a report about a failure must not fail over a lost input
        inputs = {"(unreadable)": f"{type(error).__name__}: {error}"}
    return FailingStep(
        display=record.display,
        path=record.path,
        kind=record.kind,
        attempts=len(record.attempts) + 1,
        inputs=inputs,
        failure=record.failure,
    )


def _bounded(tree: Any) -> Any:
    size = len(json.dumps(tree, default=str))
    return tree if size <= INPUT_LIMIT else f"({size:,} characters of JSON: see the step's record)"


def _commands(run_id: str, step: str | None, failed: bool) -> tuple[Command, ...]:
    again = "go on from here: finished steps are not run again" + (", the failed one is tried again" if failed else "")
    commands = [
        Command(want=again, command=f"kitaru resume {run_id}"),
        Command(want="see the whole run", command=f"kitaru show {run_id}"),
    ]
    if step is not None:
        which, quoted = "the failed step" if failed else "the last finished step", shlex.quote(step)
        given = shlex.quote(f"{step}=VALUE")
        commands += [
            Command(want=f"see {which}", command=f"kitaru step {run_id} {quoted}"),
            Command(want=f"run again from {which}, as a new run", command=f"kitaru replay {run_id} --from {quoted}"),
            Command(
                want=f"go on in a new run as if {which} had returned VALUE (JSON)",
                command=f"kitaru replay {run_id} --override {given}",
            ),
        ]
    return tuple(commands)


# --- the page ------------------------------------------------------------------------------------------------------------


def report_view(report: FailureReport) -> str:
    """The report as a page."""
    ended = "ended with an exception" if report.ending == "raised" else "was found dead: its process is gone"
    facts = f"run {report.run_id} · epoch {report.epoch} · {report.at:%Y-%m-%d %H:%M:%S %Z}"
    counts = " · ".join(f"{number} {what.replace('_', ' ')}" for what, number in report.counts.items())
    parts = [
        f'<h1>{html.escape(report.flow)} {ended}</h1><p class="facts">{html.escape(facts)}</p>',
        f'<p class="facts">{html.escape(counts)}</p>',
    ]
    if report.failure is not None:
        parts.append(html.failure_part(report.failure))
    parts.append("<h2>Go on from here</h2>")
    parts.append(html.table([(c.want, html.pre(c.command)) for c in report.commands]))
    if (step := report.failing_step) is not None:
        parts.append(f"<h2>Failing step: {html.escape(step.display)}</h2>")
        parts.append(f'<p class="note">{html.escape(step.path)} · {step.attempts} attempt(s)</p>')
        parts.append(html.table([(name, html.value_part(tree)) for name, tree in step.inputs.items()]))
        if report.failure is None or step.failure.traceback != report.failure.traceback:
            parts.append(html.failure_part(step.failure))
    if report.in_flight:
        parts.append("<h2>Steps in flight</h2>")
        parts.append(html.table([(s.display, html.escape(f"since {s.started_at:%H:%M:%S}")) for s in report.in_flight]))
    if report.last_finished:
        parts.append("<h2>Last finished steps</h2>")
        rows = [(s.display, html.escape(f"{s.ended_at:%H:%M:%S}, {s.seconds:g} s")) for s in report.last_finished]
        parts.append(html.table(rows))
    return html.page(f"{report.flow} failed", "".join(parts))


# --- storing and finding -------------------------------------------------------------------------------------------------


def failure_folder(run_id: str, epoch: int) -> str:
    """Where the report of a leg lies, relative to the artifact store's root."""
    return artifact_folder(run_id, f"failure-{epoch}")


def register_failure(
    report: FailureReport, *, run: PipelineRunResponse, store: Store, artifact_store_id: UUID, artifact_store_root: str
) -> UUID:
    """Store a report and register it in ZenML as the next version of `<flow>.failure`; once an epoch.

    Two processes that report the same dead leg agree: the report stored first stands.

    Args:
        report: The report.
        run: The ZenML pipeline run; its metadata names the artifact version.
        store: The run's store.
        artifact_store_id: Of the ZenML artifact store.
        artifact_store_root: Its URI.

    Returns:
        The artifact version.
    """
    from zenml.client import Client
    from zenml.models import ArtifactVersionFilter

    from kitaru_zenml.lineage import translate

    folder = failure_folder(report.run_id, report.epoch)
    first = store.create(f"{folder}/{REPORT}", report.model_dump_json().encode())
    if first is not None:
        report = FailureReport.model_validate_json(first)
    store.overwrite(f"{folder}/{VIEW}", report_view(report).encode("utf-8", "replace"))

    zen = Client().zen_store
    shape = translate.Run(run.id, run.project_id, report.flow, artifact_store_id, artifact_store_root)
    found = zen.list_artifact_versions(ArtifactVersionFilter(uri=f"equals:{shape.uri(folder)}", project=run.project_id)).items
    version = (found[0] if found else zen.create_artifact_version(translate.failure_request(shape, folder))).id
    noted = zen.get_run(run.id).run_metadata.get(translate.FAILURE_MARK)
    if not isinstance(noted, dict) or noted.get("artifact_version") != str(version):
        zen.create_run_metadata(translate.failure_metadata(shape, version, report.epoch))
    return version


def load_failure(store: Store, run_id: str) -> FailureReport | None:
    """The newest failure report of a run, or `None`.

    Args:
        store: The run's store.
        run_id: The run.

    Raises:
        CorruptRecord: If the report is not readable.
    """
    leases = store.list(f"kitaru/{run_id}/lease/")
    epochs = {int(stem) for name in leases if (stem := name.rpartition("/")[2].partition(".")[0]).isdigit()}
    for epoch in sorted(epochs, reverse=True):
        name = f"{failure_folder(run_id, epoch)}/{REPORT}"
        try:
            return parse_report(store.get(name), name)
        except ObjectNotFound:
            continue
    return None


def parse_report(data: bytes, name: str) -> FailureReport:
    """A stored report.

    Raises:
        CorruptRecord: If it is not one.
    """
    try:
        return FailureReport.model_validate_json(data)
    except ValidationError as error:
        raise CorruptRecord(name, f"it is not a failure report: {error.errors()[0]['msg']}") from error
