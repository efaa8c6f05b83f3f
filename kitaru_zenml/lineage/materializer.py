"""Loads recorded values through ZenML, and saves values with ZenML's materializers for the journal.

`RecordMaterializer` stands behind the artifact versions of ordinary steps: `artifact_version.load()`, the dashboard and other
pipelines read the journal's record through it, in processes that know nothing of the flow. The artifact's folder holds only the
step's view; which record it is of follows from the folder's name, so that ZenML may delete the folder and nothing is lost.

`ZenMLMaterializers` is what the codec asks when a value has no JSON form. It never falls back to pickle.
"""

from __future__ import annotations

import os
import threading
from typing import Any, ClassVar

from zenml.artifact_stores.base_artifact_store import BaseArtifactStore
from zenml.client import Client
from zenml.enums import ArtifactType
from zenml.integrations.registry import integration_registry
from zenml.materializers import DataclassMaterializer, PydanticMaterializer
from zenml.materializers.base_materializer import BaseMaterializer
from zenml.materializers.cloudpickle_materializer import CloudpickleMaterializer
from zenml.materializers.materializer_registry import materializer_registry

from kitaru_zenml.codec import Materializers, decode_value, find_class, type_path
from kitaru_zenml.errors import CorruptRecord, KitaruError
from kitaru_zenml.journal.records import MaterializedValue, StepRecord, blob_name, step_name, unseal
from kitaru_zenml.lineage.failure import REPORT, FailureReport, parse_report

_ARTIFACTS = "kitaru/artifacts/"


class RecordMaterializer(BaseMaterializer):
    """Loads the outcome of a recorded step from the journal; a step that failed loads as its `records.Failure`.

    Only kitaru writes what it reads. It is registered for no type, so that ZenML's own choice of materializers stays as it is.
    """

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (object,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA
    SKIP_REGISTRATION: ClassVar[bool] = True

    def load(self, data_type: type[Any]) -> Any:
        """The value that the step returned.

        Args:
            data_type: Its class, as registered; the record knows better.

        Raises:
            KitaruError: If the record is gone or corrupt, names a class that cannot be imported, or is pickled.
        """
        run_id, key = self._record()
        name = step_name(run_id, key)
        record = unseal(StepRecord, self._read(name), name)
        if record.outcome is None:
            return record.failure
        return decode_value(
            record.outcome,
            blob=lambda sha256: self._read(blob_name(run_id, sha256)),
            materializers=ZenMLMaterializers(self.artifact_store),
        )

    def save(self, data: Any) -> None:
        """Refuse: a record is written once, by the run.

        Raises:
            KitaruError: Always.
        """
        raise KitaruError(
            f"`RecordMaterializer` only loads what kitaru runs recorded; it cannot save a `{type_path(type(data))}`. "
            "Let ZenML choose the materializer, or return the value from a `@checkpoint`."
        )

    def _record(self) -> tuple[str, str]:
        _, found, place = self.uri.partition(_ARTIFACTS)
        run_id, _, key = place.strip("/").partition("/")
        if not found or not run_id or not key or "/" in key:
            raise KitaruError(f"The artifact at {self.uri} is not one of a kitaru step: its folder does not name a record.")
        return run_id, key

    def _read(self, name: str) -> bytes:
        return _read(self.artifact_store, name)


class FailureMaterializer(BaseMaterializer):
    """Loads the failure report of a run; only kitaru writes them."""

    ASSOCIATED_TYPES: ClassVar[tuple[type[Any], ...]] = (FailureReport,)
    ASSOCIATED_ARTIFACT_TYPE: ClassVar[ArtifactType] = ArtifactType.DATA
    SKIP_REGISTRATION: ClassVar[bool] = True

    def load(self, data_type: type[Any]) -> FailureReport:
        """The report.

        Raises:
            CorruptRecord: If it is gone or not readable.
        """
        name = f"{_ARTIFACTS}{self.uri.partition(_ARTIFACTS)[2].strip('/')}/{REPORT}"
        return parse_report(_read(self.artifact_store, name), name)


def _read(artifact_store: BaseArtifactStore, name: str) -> bytes:
    try:
        with artifact_store.open(f"{artifact_store.path.rstrip('/')}/{name}", "rb") as file:
            content: bytes = file.read()
    except FileNotFoundError as error:
        reason = "it does not exist: the run's journal was deleted, or this artifact store is not the run's"
        raise CorruptRecord(name, reason) from error
    return content


class ZenMLMaterializers(Materializers):
    """ZenML's registered materializers over one artifact store, on any thread.

    Args:
        artifact_store: The run's artifact store; the active stack's if not given.
    """

    def __init__(self, artifact_store: BaseArtifactStore | None = None) -> None:
        self._given = artifact_store

    @property
    def _artifact_store(self) -> BaseArtifactStore:
        return self._given or Client().active_stack.artifact_store

    def save(self, value: Any, folder: str) -> MaterializedValue | None:
        """Save a value by the materializer that ZenML registers for its class.

        Args:
            value: The value.
            folder: A fresh folder, relative to the artifact store's root.

        Returns:
            Where and how it was saved, or `None` if no materializer but pickle is for it.

        Raises:
            TypeError: If the materializer would pickle a part of it.
        """
        chosen = _registered(type(value))
        if chosen is None or issubclass(chosen, PydanticMaterializer | DataclassMaterializer):
            return None  # of a model, the codec's own way by Pydantic says whether it comes back equal
        if (leaf := _needs_pickle(value)) is not None:
            raise TypeError(f"it holds a `{type_path(type(leaf))}`, which only pickle could save")
        uri = self._uri(folder)
        self._artifact_store.makedirs(uri)
        materializer = chosen(uri=uri, artifact_store=self._artifact_store)
        materializer.validate_save_type_compatibility(type(value))
        materializer.save(value)
        if "://" not in uri:
            _sync(uri, self._artifact_store.path)
        return MaterializedValue(folder=folder, materializer=type_path(chosen), data_type=type_path(type(value)))

    def load(self, value: MaterializedValue) -> Any:
        """Load what `save` saved.

        Raises:
            KitaruError: If the materializer or the value's class cannot be imported here.
        """
        chosen, data_type = self._class(value.materializer), self._class(value.data_type)
        if not issubclass(chosen, BaseMaterializer):
            raise KitaruError(f"`{value.materializer}`, which saved the stored value, is not a materializer (any more).")
        return chosen(uri=self._uri(value.folder), artifact_store=self._artifact_store).load(data_type)

    def _uri(self, folder: str) -> str:
        return f"{self._artifact_store.path.rstrip('/')}/{folder}"

    @staticmethod
    def _class(path: str) -> type:
        found = find_class(path)
        if found is None:
            raise KitaruError(f"The stored value needs the class `{path}`, which cannot be imported here. Install its package.")
        return found


def _sync(folder: str, root: str) -> None:
    """Make a saved folder durable, as the record that will refer to it is: ZenML leaves that to the operating system."""
    for path, _, files in os.walk(folder):
        for name in files:
            _sync_one(os.path.join(path, name))
        _sync_one(path)
    while len(folder) > len(root) and folder != (above := os.path.dirname(folder)):
        folder = above
        _sync_one(folder)


def _sync_one(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_activation = threading.Lock()
_activated = False


def _registered(cls: type) -> type[BaseMaterializer] | None:
    """The materializer that ZenML has for a class, other than pickle."""
    global _activated
    chosen = materializer_registry[cls]
    if _is_pickle(chosen) and not _activated:
        with _activation:
            integration_registry.activate_integrations()  # numpy's, pandas', ...: importing them takes a second
            _activated = True
        chosen = materializer_registry[cls]
    return None if _is_pickle(chosen) else chosen


def _is_pickle(chosen: type[BaseMaterializer]) -> bool:
    return issubclass(chosen, CloudpickleMaterializer) or chosen is materializer_registry.get_default_materializer()


def _needs_pickle(value: Any) -> Any:
    """The part of a value that its materializer would pickle: in a container, or in a numpy array of objects."""
    if isinstance(value, dict):
        return next((leaf for item in value.items() for part in item if (leaf := _needs_pickle(part)) is not None), None)
    if isinstance(value, list | tuple | set | frozenset):
        return next((leaf for part in value if (leaf := _needs_pickle(part)) is not None), None)
    if type(value).__module__ == "numpy" and getattr(getattr(value, "dtype", None), "hasobject", False):
        return value
    return None if _registered(type(value)) is not None else value
