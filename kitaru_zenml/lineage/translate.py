"""A record as ZenML sees it: names, sources, and the requests that register a step which already happened.

Pure translation, without I/O: what goes to ZenML is decided here, when and how often it is tried is the recorder's. An artifact
version of an ordinary value points at the folder of the record's view and is loaded by `RecordMaterializer`; a value that a
ZenML materializer saved is registered under that materializer and its own folder, as if ZenML had saved it.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from zenml.config.retry_config import StepRetryConfig
from zenml.config.source import DistributionPackageSource, Source, SourceType
from zenml.config.step_configurations import GroupInfo, InputSpec, Step, StepConfiguration, StepSpec
from zenml.enums import ArtifactSaveType, ArtifactType, ExecutionStatus, MetadataResourceTypes, StepType, VisualizationType
from zenml.metadata.metadata_types import MetadataTypeEnum
from zenml.models import (
    ArtifactVersionRequest,
    ArtifactVisualizationRequest,
    ExceptionInfo,
    RunMetadataRequest,
    RunMetadataResource,
    StepRunRequest,
)
from zenml.utils import source_utils
from zenml.utils.source_utils import NoneTypeSource

from kitaru_zenml.codec import find_class
from kitaru_zenml.journal.records import (
    Attempt,
    Failure,
    JsonValue,
    MaterializedValue,
    PickledValue,
    Scope,
    StepRecord,
    artifact_folder,
    display_name,
)
from kitaru_zenml.lineage.failure import VIEW as FAILURE_PAGE

MARK = "kitaru"  # names our entry in a step's `extra` and its metadata
OUTPUT = "output"
FAILURE = "failure"
FAILURE_MARK = "kitaru_failure"
OVERRIDE = "override"
NAME_LIMIT = 255
VIEW = "step.html"

_PARAMETER_LIMIT = 200  # characters of JSON that a step's parameter shows
_PARAMETERS = 30
_METADATA_LIMIT = 20_000
PATH_LIMIT = 4000
_STEP_TYPES = {"model": StepType.LLM_CALL, "tool": StepType.TOOL_CALL, "memory": StepType.MEMORY_CALL}
_VOLATILE_KEYS = frozenset({"tool"})  # kinds whose key is an id of one call, new in every run


class RecordedStep:
    """What ZenML names as the source of a step that kitaru ran: its code belongs to the flow, its outcome to the journal."""


def _ours(module: str, name: str) -> Source:
    return DistributionPackageSource(module=f"kitaru_zenml.lineage.{module}", attribute=name, package_name="kitaru-zenml")


STEP_SOURCE = _ours("translate", "RecordedStep")
MATERIALIZER_SOURCE = _ours("materializer", "RecordMaterializer")
_OBJECT = Source(module="builtins", attribute="object", type=SourceType.BUILTIN)


@dataclass(frozen=True)
class Place:
    """Where a record went in ZenML: the step run's name, and the artifact version that holds its outcome."""

    step: str
    artifact: UUID | None
    output: str = OUTPUT


@dataclass(frozen=True)
class Run:
    """What every request of a run says."""

    id: UUID
    project: UUID
    flow: str
    artifact_store_id: UUID
    root: str  # of the artifact store

    def uri(self, name: str) -> str:
        """The URI of an object or folder of the artifact store."""
        return f"{self.root.rstrip('/')}/{name}"


# --- names ---------------------------------------------------------------------------------------------------------------


def shorten(name: str, limit: int = NAME_LIMIT) -> str:
    """A name within ZenML's limit: cut in the middle, with a digest of the whole, so that different names stay different."""
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    head = (limit - len(digest) - 2) // 2
    return f"{name[:head]}~{digest}~{name[-(limit - len(digest) - 2 - head) :]}"


def suffixed(name: str, suffix: str) -> str:
    """A name with a suffix, within ZenML's limit."""
    return shorten(name, NAME_LIMIT - len(suffix)) + suffix


def step_run_name(record: StepRecord) -> str:
    """The name of a record's step run, unique in its run."""
    return shorten(record.display)


def artifact_name(flow: str, record: StepRecord) -> str:
    """The artifact of a record's outcome, such that the same step of the next run is its next version.

    Steps go by their display names. The key of a tool call is an id that no other run has, so it gives way to the ordinal.
    """
    parts = [_stable_name(s.name, s.ordinal, s.key, s.kind) for s in record.scopes]
    parts.append(_stable_name(record.name, record.ordinal, record.key, record.kind))
    return shorten(f"{flow}::{'/'.join(parts)}::{output_name(record)}")


def _stable_name(name: str, ordinal: int, key: str | None, kind: str) -> str:
    return display_name(name, ordinal, None if kind in _VOLATILE_KEYS else key)


def output_name(record: StepRecord) -> str:
    """What a step run calls the artifact: its output, or the failure that it ended with."""
    return OUTPUT if record.outcome is not None else FAILURE


def group_of(scopes: Sequence[Scope]) -> GroupInfo | None:
    """Steps are grouped under the step or scope around them."""
    if not scopes:
        return None
    name = "/".join(display_name(s.name, s.ordinal, s.key) for s in scopes)
    return GroupInfo(id=hashlib.sha256(scopes[-1].path.encode("utf-8", "surrogatepass")).hexdigest()[:16], name=name)


# --- artifact versions ---------------------------------------------------------------------------------------------------


def artifact_uri(run: Run, key: str, record: StepRecord) -> str:
    """Where the artifact version of a record points."""
    if isinstance(record.outcome, MaterializedValue):
        return run.uri(record.outcome.folder)
    return run.uri(artifact_folder(str(run.id), key))


def view_name(run: Run, key: str) -> str:
    """Object name of a record's HTML view."""
    return f"{artifact_folder(str(run.id), key)}/{VIEW}"


def artifact_request(run: Run, key: str, record: StepRecord, tree: Any = None) -> ArtifactVersionRequest:
    """The request that registers a record's outcome.

    Args:
        run: The run.
        key: Of the record.
        record: The record.
        tree: The outcome's JSON tree, if it is at hand, to name the data type.
    """
    materializer, content_hash = MATERIALIZER_SOURCE, record.outcome_digest
    override = record.metadata.get(OVERRIDE)  # a person gave this version: who, when and why
    if isinstance(record.outcome, MaterializedValue):
        materializer, content_hash = import_source(record.outcome.materializer), None  # its own hash would be of another kind
    return ArtifactVersionRequest(
        artifact_name=artifact_name(run.flow, record),
        version=None,
        type=ArtifactType.DATA,
        artifact_store_id=run.artifact_store_id,
        uri=artifact_uri(run, key, record),
        materializer=materializer,
        data_type=data_type(record, tree),
        content_hash=content_hash,
        save_type=ArtifactSaveType.STEP_OUTPUT if override is None else ArtifactSaveType.MANUAL,
        metadata=None if override is None else {OVERRIDE: override},
        project=run.project,
        has_custom_name=False,
        visualizations=[ArtifactVisualizationRequest(type=VisualizationType.HTML, uri=run.uri(view_name(run, key)))],
    )


def data_type(record: StepRecord, tree: Any) -> Source:
    """The class of the outcome, as ZenML names it; `object` where it has no name that ZenML could load."""
    value = record.outcome
    if value is None:
        return DistributionPackageSource(module=Failure.__module__, attribute="Failure", package_name="kitaru-zenml")
    if isinstance(value, MaterializedValue | PickledValue):
        return import_source(value.data_type)
    return tree_type(value.data if isinstance(value, JsonValue) else tree)


def tree_type(tree: Any) -> Source:
    """The class that a tagged JSON tree stands for."""
    if type(tree) is not dict or "$type" not in tree:
        return NoneTypeSource if tree is None else _builtin("builtins", type(tree).__name__)
    if "class" in tree:
        return import_source(tree["class"])
    tag = tree["$type"]
    module = _MODULES.get(tag)
    return _builtin(module, tag) if module else _OBJECT


_MODULES = {
    tag: module
    for module, tags in {
        "builtins": "tuple set frozenset bytes bytearray int float dict complex",
        "datetime": "datetime date time timedelta",
        "uuid": "UUID",
        "decimal": "Decimal",
    }.items()
    for tag in tags.split()
}


def _builtin(module: str, name: str) -> Source:
    return Source(module=module, attribute=name, type=SourceType.BUILTIN)


def import_source(path: str) -> Source:
    """A class by its path, `module:qualname` or dotted; `object` for a nested class, which ZenML cannot load by name."""
    module, colon, name = path.partition(":")
    if not colon:
        module, _, name = path.rpartition(".")
    if not module or not name or "." in name:
        return _OBJECT
    try:
        return _resolved(f"{module}:{name}")
    except Exception:  # a class that is not there (any more), or that ZenML cannot place
        return Source(module=module, attribute=name, type=SourceType.UNKNOWN)


@functools.lru_cache(maxsize=512)
def _resolved(path: str) -> Source:
    found = find_class(path)
    if found is None:
        raise LookupError(path)
    return source_utils.resolve(found)


# --- step runs -----------------------------------------------------------------------------------------------------------


@dataclass
class Edges:
    """What a step run hangs on: earlier steps by name, and artifact versions by argument."""

    upstream: dict[str, None] = field(default_factory=dict)
    inputs: dict[str, list[UUID]] = field(default_factory=dict)
    specs: dict[str, list[InputSpec]] = field(default_factory=dict)

    def add_input(self, argument: str, place: Place) -> None:
        """An argument holds the outcome that lies at a place."""
        self.upstream[place.step] = None
        if place.artifact is None or place.artifact in self.inputs.get(argument, ()):
            return
        self.inputs.setdefault(argument, []).append(place.artifact)
        self.specs.setdefault(argument, []).append(InputSpec(step_name=place.step, output_name=place.output))


def edges_of(references: Mapping[str, Sequence[str]], after: Sequence[str], place_of: Callable[[str], Place | None]) -> Edges:
    """The edges of a record, as far as what they lead to is in ZenML.

    ZenML wants an upstream step to exist, and stores half of a step run before it says so: so only those that do are named.
    """
    edges = Edges()
    for argument, keys in references.items():
        for key in keys:
            if (place := place_of(key)) is not None:
                edges.add_input(argument, place)
    for key in after:
        if (place := place_of(key)) is not None:
            edges.upstream[place.step] = None
    return edges


def step_requests(
    run: Run, key: str, record: StepRecord, sha256: str, name: str, artifact: UUID | None, edges: Edges, *, earlier: int = 0
) -> list[StepRunRequest]:
    """The requests that register a record: one for each attempt that failed and was retried, and one for its end.

    ZenML keeps the versions of a step under its name, and shows all but the last as retried, if the step's retries cover them.

    Args:
        run: The run.
        key: Of the record.
        record: The record.
        sha256: The record's own hash.
        name: Of the step run.
        artifact: The artifact version of its outcome.
        edges: What it hangs on.
        earlier: How many versions of this name earlier generations have.
    """
    retries = earlier + len(record.attempts)

    def request(number: int, attempt: Attempt | None) -> StepRunRequest:
        last = attempt is None
        failure = record.failure if attempt is None else attempt.failure
        return StepRunRequest(
            name=name,
            status=ExecutionStatus.COMPLETED if failure is None else ExecutionStatus.FAILED,
            start_time=_naive(_started(record) if attempt is None else attempt.started_at),
            end_time=_naive(record.ended_at if attempt is None else attempt.ended_at),
            project=run.project,
            pipeline_run_id=run.id,
            inputs=edges.inputs,
            outputs={output_name(record): [artifact]} if last and artifact is not None else {},
            exception_info=exception_info(failure) if failure else None,
            dynamic_config=_step(key, record, sha256, name, edges, retries, None if last else number),
        )

    return [*(request(n, attempt) for n, attempt in enumerate(record.attempts)), request(len(record.attempts), None)]


def cached_request(
    run: Run, key: str, record: StepRecord, sha256: str, name: str, artifact: UUID | None, edges: Edges, original: UUID | None
) -> StepRunRequest:
    """The request that shows a record which a fork reuses, as a cached step run of the same artifact version.

    A reused failure stays a failed one: a cached step run would count as a success.

    Args:
        run: The fork.
        key: Of the record.
        record: The record.
        sha256: The record's own hash.
        name: Of the step run.
        artifact: The artifact version of its outcome, which the run that holds the record made.
        edges: What it hangs on.
        original: Its step run in that run; `None` if that is not in ZenML.
    """
    failure = record.failure
    step = _step(key, record, sha256, name, edges, 0, None)
    step.config.extra[MARK].pop("noted", None)  # its metadata is the original's, which ZenML links
    step.config.extra[MARK]["reused_from"] = record.run_id
    return StepRunRequest(
        name=name,
        status=ExecutionStatus.CACHED if failure is None else ExecutionStatus.FAILED,
        start_time=_naive(record.started_at),
        end_time=_naive(record.ended_at),
        project=run.project,
        pipeline_run_id=run.id,
        original_step_run_id=original,
        inputs=edges.inputs,
        outputs={output_name(record): [artifact]} if artifact is not None else {},
        exception_info=exception_info(failure) if failure else None,
        dynamic_config=step,
    )


def _started(record: StepRecord) -> datetime:
    """When the last attempt began."""
    return max(record.started_at, record.attempts[-1].ended_at) if record.attempts else record.started_at


def _step(key: str, record: StepRecord, sha256: str, name: str, edges: Edges, retries: int, attempt: int | None) -> Step:
    config = StepConfiguration(
        name=record.name,
        step_type=_STEP_TYPES.get(record.kind),
        parameters=parameters(record.inputs),
        extra={MARK: mark(key, record, sha256, attempt)},
        group=group_of(record.scopes),
        retry=StepRetryConfig(max_retries=retries) if retries else None,
    )
    inputs: dict[str, InputSpec | list[InputSpec]] = {}
    for argument, specs in edges.specs.items():
        inputs[argument] = specs[0] if len(specs) == 1 else specs
    spec = StepSpec(source=STEP_SOURCE, upstream_steps=list(edges.upstream), inputs=inputs, invocation_id=name)
    return Step(spec=spec, config=config, step_config_overrides=config)


def parameters(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that are small and literal, which the dashboard shows as parameters."""
    small: dict[str, Any] = {}
    for name, tree in inputs.items():
        if type(tree) is dict and any(k.startswith("$") for k in tree):
            continue
        if len(small) < _PARAMETERS and len(json.dumps(tree)) <= _PARAMETER_LIMIT:
            small[name] = tree
    return small


def exception_info(failure: Failure) -> ExceptionInfo:
    """A failure as ZenML stores it."""
    source = failure.type.replace(":", ".")
    text = failure.traceback or f"{source}: {failure.message}"
    return ExceptionInfo(traceback=text, source=source, message=failure.message[:10_000])


def metadata_request(run: Run, step_run: UUID, record: StepRecord) -> RunMetadataRequest | None:
    """The metadata of a step run; `None` if there is nothing to note.

    One entry, because ZenML commits each by itself; and only if needed, because it is a request of its own (24 ms over REST).
    """
    value = metadata(record)
    return _metadata_request(run, step_run, MetadataResourceTypes.STEP_RUN, MARK, value, step_run) if value else None


def _metadata_request(
    run: Run, of: UUID, kind: MetadataResourceTypes, name: str, value: dict[str, Any], publisher: UUID | None = None
) -> RunMetadataRequest:
    return RunMetadataRequest(
        project=run.project,
        resources=[RunMetadataResource(id=of, type=kind)],
        values={name: value},
        types={name: MetadataTypeEnum.DICT},
        publisher_step_id=publisher,
    )


def metadata(record: StepRecord) -> dict[str, Any]:
    """What is noteworthy about how a step went, beside its inputs and outputs."""
    noted: dict[str, Any] = {}
    if record.usage is not None:
        noted["usage"] = record.usage.model_dump(exclude_none=True)
    if record.attempts:
        noted["attempts"] = len(record.attempts) + 1
    for name, values in (("drift", record.drift), ("opaque", record.opaque)):
        if values:
            noted[name] = [shorten(value) for value in values[:50]]
    if record.metadata and len(json.dumps(record.metadata, default=str)) <= _METADATA_LIMIT:
        noted["metadata"] = record.metadata
    return noted


def mark(key: str, record: StepRecord, sha256: str, attempt: int | None = None) -> dict[str, Any]:
    """What a step run's `extra` says of the record behind it; kitaru recognizes its step runs by it.

    Args:
        key: Of the record.
        record: The record.
        sha256: The record's own hash.
        attempt: Which of the attempts that failed and were retried the step run shows; `None` for the step's end.
    """
    known: dict[str, Any] = {
        "key": key,
        "path": shorten(record.path, PATH_LIMIT),
        "kind": record.kind,
        "number": record.number,
        "epoch": record.epoch,
        "generation": record.generation,
        "idempotency_key": record.idempotency_key,
        "record": sha256,
    }
    if attempt is not None:
        known["attempt"] = attempt
    elif metadata(record):
        known["noted"] = True  # so that metadata that a crash kept from ZenML is missed
    return known


def _naive(moment: datetime) -> datetime:
    return moment.astimezone(UTC).replace(tzinfo=None)  # as ZenML stores times


# --- the failure artifact ------------------------------------------------------------------------------------------------


def failure_request(run: Run, folder: str) -> ArtifactVersionRequest:
    """The request that registers a failure report as a version of `<flow>.failure`, which the dashboard lists."""
    return ArtifactVersionRequest(
        artifact_name=suffixed(run.flow, ".failure"),
        version=None,
        type=ArtifactType.DATA,
        artifact_store_id=run.artifact_store_id,
        uri=run.uri(folder),
        materializer=_ours("materializer", "FailureMaterializer"),
        data_type=_ours("failure", "FailureReport"),
        save_type=ArtifactSaveType.MANUAL,
        project=run.project,
        has_custom_name=True,
        visualizations=[ArtifactVisualizationRequest(type=VisualizationType.HTML, uri=run.uri(f"{folder}/{FAILURE_PAGE}"))],
    )


def failure_metadata(run: Run, version: UUID, epoch: int) -> RunMetadataRequest:
    """The run's metadata that leads to its failure report."""
    value = {"artifact_version": str(version), "epoch": epoch}
    return _metadata_request(run, run.id, MetadataResourceTypes.PIPELINE_RUN, FAILURE_MARK, value)
