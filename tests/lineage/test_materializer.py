"""Recorded values through ZenML: loaded in a process that knows nothing of the flow, saved without pickle."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import numpy as np
import pytest
from zenml.client import Client
from zenml.materializers.cloudpickle_materializer import CloudpickleMaterializer
from zenml.materializers.materializer_registry import materializer_registry

from kitaru_zenml.codec import encode_value, to_tree
from kitaru_zenml.errors import CorruptRecord, KitaruError
from kitaru_zenml.journal.records import BlobValue, JsonValue, MaterializedValue, PickledValue, blob_name, step_name
from kitaru_zenml.lineage.materializer import FailureMaterializer, RecordMaterializer, ZenMLMaterializers
from kitaru_zenml.lineage.recorder import Recorder
from tests.lineage.conftest import Scene, output_of


def load_elsewhere(artifact_version: UUID, folder: Path) -> str:
    """Load an artifact version by a script in an empty folder, with ZenML alone; returns what it prints."""
    code = f"from zenml.client import Client; print(repr(Client().get_artifact_version('{artifact_version}').load()))"
    path = os.pathsep.join(p for p in sys.path if p)
    environment = {**os.environ, "PYTHONPATH": path}
    script = folder / "load.py"
    script.write_text(code)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


def test_an_outcome_loads_in_a_process_that_never_saw_the_flow(scene: Scene, recorder: Recorder, tmp_path: Path) -> None:
    recorder.register_now([scene.record(outcome=JsonValue(data=to_tree({"when": dt.date(2026, 3, 1), "of": (1, 2)})))])
    version = output_of(scene.steps()["fetch#0"])
    assert load_elsewhere(version.id, tmp_path) == "{'when': datetime.date(2026, 3, 1), 'of': (1, 2)}"


def test_a_large_outcome_loads_from_its_blob(scene: Scene, recorder: Recorder) -> None:
    encoded = encode_value(["x" * 100] * 50, step="fetch", inline_limit=100, folder=lambda: "", materializers=None)
    assert isinstance(encoded.value, BlobValue)
    assert encoded.blob is not None
    scene.store.create(blob_name(str(scene.run.id), encoded.blob[0]), encoded.blob[1])
    recorder.register_now([scene.record(outcome=encoded.value)])
    version = output_of(scene.steps()["fetch#0"])
    assert version.data_type.attribute == "list"
    assert version.load() == ["x" * 100] * 50


def test_a_materialized_value_is_registered_as_zenml_would_have(scene: Scene, recorder: Recorder, tmp_path: Path) -> None:
    materializers = ZenMLMaterializers(Client().active_stack.artifact_store)
    saved = materializers.save(np.arange(3), f"kitaru/artifacts/{scene.run.id}/value-1")
    assert saved is not None
    recorder.register_now([scene.record(outcome=saved)])
    version = output_of(scene.steps()["fetch#0"])
    assert version.materializer.attribute == "NumpyMaterializer"
    assert version.uri.endswith("/value-1")
    assert load_elsewhere(version.id, tmp_path) == "array([0, 1, 2])"


def test_deleting_an_artifact_version_leaves_the_record(scene: Scene, recorder: Recorder) -> None:
    key = scene.record()
    recorder.register_now([key])
    version = output_of(scene.steps()["fetch#0"])
    Client().active_stack.artifact_store.rmtree(version.uri)  # as ZenML does with the version
    assert scene.store.get(step_name(str(scene.run.id), key))


def test_a_class_that_cannot_be_imported_is_named(scene: Scene, recorder: Recorder) -> None:
    tree = {"items": [{"$type": "model", "class": "nowhere_at_all:Invoice", "value": {}, "set": []}]}
    recorder.register_now([scene.record(outcome=JsonValue(data=tree))])
    with pytest.raises(KitaruError, match="nowhere_at_all:Invoice"):
        output_of(scene.steps()["fetch#0"]).load()


def test_a_pickled_outcome_is_not_unpickled_unasked(scene: Scene, recorder: Recorder) -> None:
    recorder.register_now([scene.record(outcome=PickledValue(sha256="0" * 64, size=3, data_type="builtins:object"))])
    with pytest.raises(KitaruError, match="unpickling runs code"):
        output_of(scene.steps()["fetch#0"]).load()


def test_a_lost_record_is_named(scene: Scene, recorder: Recorder) -> None:
    key = scene.record()
    recorder.register_now([key])
    scene.store.delete([step_name(str(scene.run.id), key)])
    with pytest.raises(CorruptRecord, match="does not exist"):
        output_of(scene.steps()["fetch#0"]).load()


def test_zenmls_own_choice_of_materializers_stays_as_it_is() -> None:
    registered = set(materializer_registry.get_materializer_types().values())
    assert not registered & {RecordMaterializer, FailureMaterializer}
    assert materializer_registry[object] is CloudpickleMaterializer
    with pytest.raises(KitaruError, match="only loads"):
        RecordMaterializer("x").save(1)


class Plain:
    """A class that only pickle could store."""


@pytest.mark.parametrize("value", [Plain(), np.float32, threading.Lock()])
def test_what_only_pickle_could_save_is_refused(value: Any) -> None:
    assert ZenMLMaterializers().save(value, "kitaru/artifacts/x/y") is None


@pytest.mark.parametrize("value", [{"a": np.arange(2), "b": Plain()}, [np.arange(2), {"c": (Plain(),)}], np.array([Plain()])])
def test_a_container_that_holds_what_only_pickle_could_save_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="only pickle"):
        ZenMLMaterializers().save(value, "kitaru/artifacts/x/y")


def test_values_are_saved_and_loaded_on_other_threads(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("hello")
    values: list[Any] = [np.eye(2), tmp_path / "note.txt", {"x": np.arange(2), "y": "z"}]
    loaded: list[Any] = []

    def work() -> None:
        materializers = ZenMLMaterializers(Client().active_stack.artifact_store)
        for n, value in enumerate(values):
            saved = materializers.save(value, f"kitaru/artifacts/{scene.run.id}/thread-{n}")
            assert isinstance(saved, MaterializedValue)
            loaded.append(materializers.load(saved))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert (loaded[0] == np.eye(2)).all()
    assert loaded[1].read_text() == "hello"
    assert loaded[2]["y"] == "z"
