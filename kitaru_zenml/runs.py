"""Finding a run, its store and its journal; the handle of a run. The read side of everything."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from uuid import UUID

from zenml.client import Client
from zenml.enums import ExecutionStatus
from zenml.models import PipelineRunResponse
from zenml.stack import Stack
from zenml.utils import source_utils

from kitaru_zenml import codec
from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.errors import AmbiguousRun, KitaruError, NoJournal, RunNotFound, RunSuspended
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.records import RunInfo, record_key
from kitaru_zenml.options import FlowOptions

if TYPE_CHECKING:
    from zenml.artifact_stores import BaseArtifactStore

    from kitaru_zenml.execution import LegSummary

R = TypeVar("R")
PARENT = "kitaru_parent"  # under this name a child run's configuration names its parent run
EXTRA = "kitaru"  # under this name the flow's options travel in the pipeline's configuration


def find_run(run: str | UUID) -> PipelineRunResponse:
    """The ZenML run with this id, id prefix or name.

    Raises:
        RunNotFound: If there is none.
        AmbiguousRun: If the prefix fits several.
    """
    client, text = Client(), str(run).strip()
    if not text:
        raise RunNotFound(text)
    try:
        return client.get_pipeline_run(UUID(text), allow_name_prefix_match=False)
    except KeyError:
        raise RunNotFound(text) from None
    except ValueError:
        pass
    named = client.list_pipeline_runs(name=text, size=2)
    if named.total == 1:
        return client.get_pipeline_run(named.items[0].id)
    found = client.list_pipeline_runs(id=f"startswith:{text}", size=6)
    if found.total > 1:
        raise AmbiguousRun(text, [str(r.id) for r in found.items])
    if found.total == 0:
        raise RunNotFound(text)
    return client.get_pipeline_run(found.items[0].id)


def run_stack(run: PipelineRunResponse) -> Stack:
    """The stack the run was started on.

    Raises:
        KitaruError: If it was deleted.
    """
    model = run.snapshot.stack if run.snapshot else None
    if model is None:
        raise KitaruError(f"The stack of run {run.id} was deleted; register it again to reach the run's journal.")
    ensure_source_root()
    return Stack.from_model(model)


def ensure_source_root() -> None:
    """Let ZenML import by the working folder where there is no main file to go by (`python -c`, a test process)."""
    try:
        source_utils.get_source_root()
    except RuntimeError:
        source_utils.set_custom_source_root(os.getcwd())


def artifact_store_of(run: PipelineRunResponse) -> BaseArtifactStore:
    """The artifact store that holds the run's journal."""
    return run_stack(run).artifact_store


def flow_options(run: PipelineRunResponse) -> FlowOptions | None:
    """The options the flow was started with; `None` if it is not a run of a kitaru flow."""
    extra = run.config.extra if run.config else {}
    return FlowOptions(**extra[EXTRA]) if EXTRA in extra else None


def open_journal(run: PipelineRunResponse) -> Journal:
    """The journal of a run.

    Raises:
        NoJournal: If it has none.
        StoreUnavailable: If its artifact store cannot be reached.
    """
    journal = Journal(open_store(artifact_store_of(run)), str(run.id))
    if not journal.exists():
        raise NoJournal(str(run.id), journal.store.uri)
    return journal


def result_of(run: PipelineRunResponse, journal: Journal) -> Any:
    """The flow's stored result.

    Raises:
        Exception: The failure that ended the run.
        KitaruError: If the run has no result yet.
    """
    from kitaru_zenml.lineage.materializer import ZenMLMaterializers

    info, options = journal.info(), flow_options(run) or FlowOptions()
    root = journal.records([record_key(info.flow, "/", 0)]) if info is not None else []
    if root and root[0].outcome is not None:
        materializers = ZenMLMaterializers(artifact_store_of(run))
        return codec.decode_value(
            root[0].outcome, blob=journal.blob, materializers=materializers, allow_pickle=options.allow_pickle
        )
    close = journal.last_close()
    if close is not None and close.failure is not None:
        raise codec.decode_failure(close.failure)
    if close is not None and close.status == "paused":
        raise RunSuspended(journal.run_id, [(wait.kind, wait.display) for wait in journal.open_waits()])
    raise KitaruError(f"Run {journal.run_id} has no result yet. See where it is with `kitaru show {journal.run_id}`.")


def named_run(name: str) -> PipelineRunResponse | None:
    """The run with exactly this name."""
    found = Client().list_pipeline_runs(name=f"equals:{name}", size=1)
    return Client().get_pipeline_run(found.items[0].id, allow_name_prefix_match=False) if found.items else None


def successor_of(run: PipelineRunResponse) -> PipelineRunResponse | None:
    """The latest fork of a run, or of its forks, that completed."""
    store = open_store(artifact_store_of(run))
    pending, latest = [str(run.id)], None
    while pending:
        for fork_id in Journal(store, pending.pop()).forks():
            try:
                fork = Client().get_pipeline_run(UUID(fork_id), allow_name_prefix_match=False)
            except KeyError:
                continue
            pending.append(fork_id)
            if fork.status == ExecutionStatus.COMPLETED and (latest is None or fork.created > latest.created):
                latest = fork
    return latest


class RunHandle(Generic[R]):
    """A run that was started or resumed."""

    def __init__(self, run_id: UUID | str, leg: LegSummary | None = None) -> None:
        self.id = str(run_id)
        self.leg = leg  # what was replayed and what ran, if this process executed the run

    def __repr__(self) -> str:
        return f"RunHandle({self.id!r})"

    @property
    def run(self) -> PipelineRunResponse:
        """The ZenML pipeline run, as it is now."""
        return find_run(self.id)

    @property
    def status(self) -> str:
        """ZenML's status of the run now, for example `running`, `completed` or `failed`."""
        return self.run.status.value

    @property
    def info(self) -> RunInfo | None:
        """What the run executes."""
        return open_journal(self.run).info()

    def wait(self, timeout: float | None = None) -> str:
        """Wait until the run has ended or paused.

        Args:
            timeout: Seconds, or `None`.

        Returns:
            Its status.

        Raises:
            TimeoutError: If it goes on for longer.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not ((status := self.run.status).is_finished or status == ExecutionStatus.PAUSED):
            if deadline is not None and time.monotonic() > deadline:
                raise TimeoutError(f"run {self.id} is still {status.value} after {timeout} s")
            time.sleep(0.5)
        return status.value

    def result(self, timeout: float | None = None) -> R:
        """The flow's return value; waits for it.

        Args:
            timeout: Seconds to wait, or `None`.

        Raises:
            Exception: The failure that ended the run.
            RunSuspended: If it is suspended.
            TimeoutError: If it goes on for longer.
        """
        self.wait(timeout)
        run = self.run
        value: R = result_of(run, open_journal(run))
        return value
