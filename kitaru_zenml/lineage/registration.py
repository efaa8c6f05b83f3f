"""Registers records in ZenML, each once, whatever was cut short before.

ZenML has no transaction over an artifact version and its step run, so each call may have happened although its reply was lost
or its process died. What makes a repetition harmless: an artifact version is looked up by its URI before it is made again, and
a step run by its name, whose entry in `extra` says which record it is of. On a fresh run neither is looked up: nothing can be
there.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pydantic_core import from_json
from zenml.exceptions import EntityExistsError
from zenml.models import ArtifactVersionFilter, StepRunFilter, StepRunResponse, StepRunUpdate

from kitaru_zenml.errors import CorruptRecord, KitaruError
from kitaru_zenml.inputs import references
from kitaru_zenml.journal.records import BlobValue, JsonValue, Reused, StepRecord, blob_name, sealed_hash, step_name, unseal
from kitaru_zenml.journal.store import ObjectNotFound, Store
from kitaru_zenml.lineage import html, translate
from kitaru_zenml.lineage.translate import MARK, Place, Run

if TYPE_CHECKING:
    from zenml.zen_stores.base_zen_store import BaseZenStore

PAGE = 100  # step runs a request: hydrated, each is some 20 KB in memory
VIEW_BLOB_LIMIT = 512 * 1024  # bytes of a value that is read to be shown
_VIEW_THREADS = 8


class RecordGone(KitaruError):
    """A record that was said to be stored is not there."""

    def __init__(self, key: str) -> None:
        super().__init__(f"The record `{key}` is not in the journal any more, so it cannot be shown in ZenML.")
        self.key = key


@dataclass(frozen=True, slots=True)
class Original:
    """The step run of a record that a fork reuses, in the run that holds it."""

    id: UUID
    artifact: UUID | None
    inputs: dict[str, list[UUID]]


@dataclass
class Pending:
    """A record on its way into ZenML."""

    key: str
    record: StepRecord
    sha256: str
    has_view: bool = False
    tree: Any = None
    artifact: UUID | None = None
    step_run: UUID | None = None
    name: str = ""
    artifact_in_doubt: bool = False  # a request for it may have succeeded
    step_in_doubt: bool = False
    home: Run | None = None  # of a reused record: the run that holds it
    original: Original | None = None  # its step run there

    @property
    def has_artifact(self) -> bool:
        """Whether its artifact version is there already: a native step's, or that of the run that holds the record."""
        return self.artifact is not None or (self.home is None and self.record.step_run is not None)


class Places:
    """Record key -> `Place`, packed: a run of many thousand steps keeps one entry for each (some 200 bytes)."""

    def __init__(self) -> None:
        self._packed: dict[bytes, bytes] = {}

    def get(self, key: str) -> Place | None:
        """Where the record went, if it is in ZenML."""
        packed = self._packed.get(_short(key))
        if packed is None:
            return None
        (length,) = struct.unpack_from("<H", packed, 16)
        step = packed[18 : 18 + length].decode("utf-8", "surrogatepass")
        artifact = UUID(bytes=packed[:16]) if any(packed[:16]) else None
        return Place(step, artifact, packed[18 + length :].decode("utf-8", "surrogatepass") or translate.OUTPUT)

    def put(self, key: str, place: Place) -> None:
        """Remember where a record went."""
        step = place.step.encode("utf-8", "surrogatepass")
        output = b"" if place.output == translate.OUTPUT else place.output.encode("utf-8", "surrogatepass")
        artifact = place.artifact.bytes if place.artifact else bytes(16)
        self._packed[_short(key)] = artifact + struct.pack("<H", len(step)) + step + output

    def __contains__(self, key: str) -> bool:
        return _short(key) in self._packed


def _short(key: str) -> bytes:
    try:
        return bytes.fromhex(key[-20:])
    except ValueError:
        return key.encode("utf-8", "surrogatepass")


class Registration:
    """Writes records' views and makes their artifact versions and step runs. Used by one thread."""

    def __init__(self, run: Run, store: Store, zen_store: BaseZenStore, reused: Mapping[str, Reused] | None = None) -> None:
        self.run, self.store, self.zen = run, store, zen_store
        self.places = Places()
        self.reused: Mapping[str, Reused] = reused if reused is not None else {}
        self._originals: dict[str, dict[str, Original]] = {}  # run -> key -> its step run, of runs that are reused

    # --- reading ---

    def load(self, keys: Sequence[str]) -> tuple[list[Pending], list[tuple[str, KitaruError]]]:
        """Read records from the journal: those to register, and those that cannot be."""
        holders = {key: of.run_id for key in keys if (of := self.reused.get(key)) is not None}
        names = [step_name(holders.get(key, str(self.run.id)), key) for key in keys]
        found: list[Pending] = []
        lost: list[tuple[str, KitaruError]] = []
        for key, name, data in zip(keys, names, self.store.get_many(names), strict=True):
            if data is None:
                lost.append((key, RecordGone(key)))
                continue
            try:
                pending = Pending(key, unseal(StepRecord, data, name), sealed_hash(data))
                if key in holders:
                    pending.home = replace(self.run, id=UUID(holders[key]))
                found.append(pending)
            except CorruptRecord as error:
                lost.append((key, error))
        return [p for p in found if p.record.is_shown], lost

    def survey(self, keys: Sequence[str]) -> tuple[list[str], set[str]]:
        """Learn what of the run is in ZenML already.

        Returns:
            The keys that are not, or not wholly, in order of delivery; and those of them that are there in part.
        """
        partly = set()
        for step in self._list_steps(self.run.id):
            mark = mark_of(step)
            if mark is None:
                continue
            key = mark["key"]
            if "attempt" in mark or _is_torn(step) or ("noted" in mark and MARK not in step.run_metadata):
                partly.add(key)
            else:
                self.places.put(key, place_of(step))
                partly.discard(key)
        missing = [key for key in keys if key not in self.places]
        order: dict[str, int] = {}
        for at in range(0, len(missing), PAGE):
            pending, lost = self.load(missing[at : at + PAGE])
            order.update({p.key: p.record.number for p in pending})
            order.update({key: -1 for key, _ in lost})  # so that they are reported
        return sorted(order, key=order.__getitem__), partly

    def _list_steps(self, run_id: UUID, **filters: Any) -> Iterator[StepRunResponse]:
        page = 1
        while True:
            query = StepRunFilter(
                pipeline_run_id=run_id, project=self.run.project, size=PAGE, page=page, sort_by="asc:created", **filters
            )
            found = self.zen.list_run_steps(query, hydrate=True)
            yield from found.items
            page += 1
            if page > found.total_pages:
                return

    # --- registering ---

    def register(self, work: MutableSequence[Pending], at_once: int) -> None:
        """Register the first `at_once` of `work`, in their order; each leaves `work` when it is done.

        Raises:
            Exception: Whatever ZenML or a store raised. If it is about one record, that is the first one left in `work`, or any
                of them if none has left it: their artifact versions are made by one request.
        """
        batch = work[:at_once]
        self._find_originals(batch)
        self._write_views(batch)
        self._create_artifacts(batch)
        for pending in batch:
            self._create_step(pending)
            del work[0]

    def _find_originals(self, work: Sequence[Pending]) -> None:
        """The step runs and artifact versions of reused records, where the run that holds them has them in ZenML."""
        for pending in work:
            if pending.home is None or pending.artifact is not None:
                continue
            home = pending.home.id
            if str(home) not in self._originals:
                self._originals[str(home)] = dict(_originals(self._list_steps(home)))
            known = self._originals[str(home)]
            pending.original = known.get(pending.record.step_run or pending.key)
            pending.artifact = pending.original.artifact if pending.original is not None else None
            pending.artifact_in_doubt = pending.artifact is None  # that run may be about to register it, too

    def _write_views(self, work: Sequence[Pending]) -> None:
        missing = [p for p in work if not p.has_view and not p.has_artifact]
        if len(missing) > 1 and "://" in self.store.uri:
            with ThreadPoolExecutor(_VIEW_THREADS, thread_name_prefix="kitaru-view") as pool:
                list(pool.map(self._write_view, missing))
        else:
            for pending in missing:
                self._write_view(pending)

    def _write_view(self, pending: Pending) -> None:
        record = pending.record
        output = self._output_tree(record)
        pending.tree = None if isinstance(output, html.NotAtHand) else output
        text = html.step_view(record, output, self._name_of)
        self._write(translate.view_name(pending.home or self.run, pending.key), text.encode("utf-8", "replace"))
        pending.has_view = True

    def _write(self, name: str, data: bytes) -> None:
        if "://" in self.store.uri:
            self.store.overwrite(name, data)
            return
        # Not synced, unlike what the store writes: a view that a power cut takes is a page less, and steps wait for syncs.
        path = f"{self.store.uri.rstrip('/')}/{name}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    def _output_tree(self, record: StepRecord) -> Any:
        value = record.outcome
        if value is None:
            return None
        if isinstance(value, JsonValue):
            return value.data
        if isinstance(value, BlobValue):
            if value.size > VIEW_BLOB_LIMIT:
                return html.NotAtHand(value.size)
            try:
                return from_json(self.store.get(blob_name(record.run_id, value.sha256)))
            except ObjectNotFound:
                return html.NotAtHand(value.size)
        return value.model_dump()

    def _name_of(self, key: str) -> str | None:
        place = self.places.get(key)
        return place.step if place else None

    def _create_artifacts(self, work: Sequence[Pending]) -> None:
        missing = [p for p in work if not p.has_artifact]
        doubtful = [p for p in missing if p.artifact_in_doubt]
        if doubtful:
            self._find_artifacts(doubtful)
            missing = [p for p in missing if p.artifact is None]
        if not missing:
            return
        requests = [translate.artifact_request(p.home or self.run, p.key, p.record, p.tree) for p in missing]
        try:
            made = self.zen.batch_create_artifact_versions(requests)
        except Exception:
            for pending in missing:
                pending.artifact_in_doubt = True
            raise
        for pending, version in zip(missing, made, strict=True):
            pending.artifact = version.id
            pending.tree = None  # it served to name the type

    def _find_artifacts(self, doubtful: Sequence[Pending]) -> None:
        for at in range(0, len(doubtful), 20):  # their URIs travel in a query string
            uris = {translate.artifact_uri(p.home or self.run, p.key, p.record): p for p in doubtful[at : at + 20]}
            query = ArtifactVersionFilter(
                uri="oneof:" + json.dumps(list(uris)), project=self.run.project, size=PAGE, sort_by="desc:created"
            )
            for version in self.zen.list_artifact_versions(query).items:
                uris[version.uri].artifact = version.id

    def _create_step(self, pending: Pending) -> None:
        key, record = pending.key, pending.record
        if record.step_run is not None and pending.home is None:
            self.places.put(key, place_of(self.zen.get_run_step(UUID(record.step_run), hydrate=False)))
            return
        if pending.step_run is None:
            pending.name = pending.name or translate.step_run_name(record)
            if not pending.step_in_doubt and record.generation == 0:
                try:
                    self._create_versions(pending, pending.name, made=0, earlier=0)
                except EntityExistsError:
                    self._create_missing_versions(pending)
            else:
                self._create_missing_versions(pending)
        assert pending.step_run is not None
        request = translate.metadata_request(self.run, pending.step_run, record) if pending.home is None else None
        if request is not None:
            self.zen.create_run_metadata(request)
        self.places.put(key, Place(pending.name, pending.artifact, translate.output_name(record)))

    def _create_missing_versions(self, pending: Pending) -> None:
        """Create what a repetition still has to, under a name that no other record has."""
        record = pending.record
        name = base = translate.step_run_name(record)
        for suffix in self._suffixes(record):
            name = translate.suffixed(base, suffix) if suffix else base
            ours: list[StepRunResponse] = []
            others: list[StepRunResponse] = []
            strangers = False
            for step in self._list_steps(self.run.id, name=f"equals:{name}"):
                mark = mark_of(step) or {}
                if mark.get("key") == pending.key:
                    ours.append(step)
                else:
                    others.append(step)
                    # A generation that succeeded and was retired keeps its name: ZenML adds no version after a success.
                    is_earlier_generation = mark.get("path") == translate.shorten(record.path, translate.PATH_LIMIT)
                    strangers = strangers or not is_earlier_generation or step.status.is_successful
            if ours or not strangers:
                break
        pending.name = name
        for step in ours:
            if "attempt" not in (mark_of(step) or {}):
                if _is_torn(step):
                    self._complete(step, pending)
                pending.step_run = step.id
                return
        self._create_versions(pending, name, made=len(ours), earlier=len(others))

    def _complete(self, step: StepRunResponse, pending: Pending) -> None:
        """Add what a step run lacks that ZenML stored in part: it commits the row first, then what it is linked to."""
        assert pending.artifact is not None, "artifact versions are made before their step runs"
        edges = self._edges(pending)
        inputs = {name: versions[0] for name, versions in edges.inputs.items() if name not in step.inputs}
        outputs = {translate.output_name(pending.record): [pending.artifact]}
        self.zen.update_run_step(step.id, StepRunUpdate(outputs=outputs, loaded_artifact_versions=inputs))

    def _edges(self, pending: Pending) -> translate.Edges:
        """What its step run hangs on. The inputs of a reused record are those of its original, which ZenML insists on."""

        def place_of_reused(key: str) -> Place | None:  # a record of our own under that key is not what it refers to
            return self.places.get(key) if key in self.reused else None

        record, place = pending.record, self.places.get if pending.home is None else place_of_reused
        edges = translate.edges_of(references(record.inputs), record.after, place)
        if pending.original is not None:
            edges.inputs = pending.original.inputs
        return edges

    def _suffixes(self, record: StepRecord) -> list[str]:
        generation = f"~g{record.generation}" if record.generation else ""
        digest = f"~{_digest(record.path)}"
        return list(dict.fromkeys(["", generation or digest, digest, digest + (generation or "~g0")]))

    def _create_versions(self, pending: Pending, name: str, *, made: int, earlier: int) -> None:
        record, edges = pending.record, self._edges(pending)
        if pending.home is None:
            requests = translate.step_requests(
                self.run, pending.key, record, pending.sha256, name, pending.artifact, edges, earlier=earlier
            )
        else:
            original = pending.original.id if pending.original is not None else None
            requests = [
                translate.cached_request(self.run, pending.key, record, pending.sha256, name, pending.artifact, edges, original)
            ]
        pending.step_in_doubt = True
        for request in requests[made:]:
            created = self.zen.create_run_step(request)
        pending.step_run = created.id


def _originals(steps: Iterable[StepRunResponse]) -> Iterator[tuple[str, Original]]:
    """The step runs that show the end of a record of their own run, by key; native ones by their own id, as records name them."""
    for step in steps:
        mark = mark_of(step)
        if mark is not None and ("attempt" in mark or "reused_from" in mark):
            continue
        inputs = {name: [version.id for version in versions] for name, versions in step.inputs.items()}
        yield str(step.id) if mark is None else mark["key"], Original(step.id, place_of(step).artifact, inputs)


def mark_of(step: StepRunResponse) -> dict[str, Any] | None:
    """Which record a hydrated step run is of; `None` for one that kitaru did not register."""
    mark = step.config.extra.get(MARK)
    return mark if isinstance(mark, dict) and "key" in mark else None


def _is_torn(step: StepRunResponse) -> bool:
    """Whether ZenML stored a step run without its outcome: every record has one, as output or as failure."""
    return not step.outputs and "attempt" not in (mark_of(step) or {})


def place_of(step: StepRunResponse) -> Place:
    """Where a step run's outcome is."""
    for output, versions in sorted(step.outputs.items(), key=lambda item: item[0] != translate.OUTPUT):
        if versions:
            return Place(step.name, versions[0].id, output)
    return Place(step.name, None)


def _digest(path: str) -> str:
    return hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:8]
