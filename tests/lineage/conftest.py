"""A real ZenML on SQLite, and runs whose records are written by hand."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

if "ZENML_CONFIG_PATH" not in os.environ:  # before the first import of ZenML
    os.environ["ZENML_CONFIG_PATH"] = tempfile.mkdtemp(prefix="kitaru-lineage-")
os.environ.setdefault("ZENML_ANALYTICS_OPT_IN", "false")
os.environ.setdefault("ZENML_LOGGING_VERBOSITY", "WARN")
os.environ.setdefault("ZENML_ENABLE_REPO_INIT_WARNINGS", "false")

import pytest
from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import ArtifactVersionResponse, PipelineRunResponse, PipelineRunUpdate, StepRunFilter, StepRunResponse
from zenml.pipelines.dynamic.pipeline_definition import DynamicPipeline
from zenml.pipelines.run_utils import create_placeholder_run

from kitaru_zenml.journal.local import LocalStore
from kitaru_zenml.journal.records import Failure, JsonValue, StepRecord, record_key, seal, step_name
from kitaru_zenml.lineage.recorder import Recorder

EPOCH = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)


def _no_steps() -> None:
    pass


def new_run(flow: str) -> PipelineRunResponse:
    """A dynamic pipeline run that is running, of which nothing but the recorder makes steps."""
    pipeline = DynamicPipeline(name=flow, entrypoint=_no_steps)
    pipeline.prepare()
    run = create_placeholder_run(snapshot=pipeline._create_snapshot(**pipeline._run_args))
    return Client().zen_store.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.RUNNING))


def boom(message: str = "boom") -> Failure:
    """A recorded exception."""
    return Failure(type="builtins:ValueError", message=message, traceback=f"Traceback\nValueError: {message}")


@dataclass
class Scene:
    """A run, its store, and hands to write records and read ZenML."""

    run: PipelineRunResponse
    store: LocalStore
    flow: str
    count: int = 0
    said: list[str] = field(default_factory=list)

    def record(self, name: str = "fetch", **fields: Any) -> str:
        """Write a record into the journal, numbered in order; returns its key."""
        number = fields.setdefault("number", self.count)
        self.count = max(self.count, number) + 1
        values: dict[str, Any] = {
            "nonce": f"n{number}",
            "run_id": str(self.run.id),
            "epoch": 1,
            "path": f"/{name}@abc#.{number}",
            "name": name,
            "ordinal": number,
            "digest": "d" * 64,
            "turn": ("", number),
            "outcome": None if "failure" in fields else JsonValue(data={"n": number}),
            "started_at": EPOCH + timedelta(seconds=number),
            "ended_at": EPOCH + timedelta(seconds=number, milliseconds=500),
        }
        record = StepRecord(**{**values, **fields})
        key = record_key(record.name, record.path, record.generation)
        self.store.create(step_name(str(self.run.id), key), seal(record))
        return key

    def recorder(self) -> Recorder:
        """A recorder of the run."""
        component = Client().active_stack.artifact_store
        return Recorder(
            run=self.run,
            store=self.store,
            artifact_store_id=component.id,
            artifact_store_root=component.path,
            flow=self.flow,
            on_error=self.said.append,
        )

    def steps(self) -> dict[str, StepRunResponse]:
        """The newest version of every step run of the run, hydrated."""
        return {step.name: step for step in sorted(self.versions(), key=lambda step: step.version)}

    def versions(self) -> list[StepRunResponse]:
        """All versions of all step runs of the run, hydrated."""
        query = StepRunFilter(pipeline_run_id=self.run.id, project=self.run.project_id, size=1000, sort_by="asc:created")
        return list(Client().zen_store.list_run_steps(query, hydrate=True).items)

    def set_status(self, status: ExecutionStatus) -> None:
        """Change the run's status."""
        Client().zen_store.update_run(self.run.id, PipelineRunUpdate(status=status))


def output_of(step: StepRunResponse, name: str = "output") -> ArtifactVersionResponse:
    """The only artifact version of an output, hydrated."""
    [version] = step.outputs[name]
    return Client().get_artifact_version(version.id)


@pytest.fixture(scope="session")
def local_store() -> LocalStore:
    """The store at the root of the active stack's artifact store."""
    root = Client().active_stack.artifact_store.path
    os.makedirs(root, exist_ok=True)
    return LocalStore(root)


@pytest.fixture
def scene(local_store: LocalStore, request: pytest.FixtureRequest) -> Scene:
    """A fresh run of a flow named after the test."""
    flow = request.node.name[:60]
    return Scene(new_run(flow), local_store, flow)


@pytest.fixture
def another_run(scene: Scene) -> Callable[[], Scene]:
    """Makes further runs of the same flow."""
    return lambda: Scene(new_run(scene.flow), scene.store, scene.flow)


@pytest.fixture
def recorder(scene: Scene) -> Iterator[Recorder]:
    """A started recorder of the run."""
    recorder = scene.recorder()
    recorder.start()
    yield recorder
    recorder.close()
