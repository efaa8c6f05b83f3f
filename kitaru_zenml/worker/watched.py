"""What a worker watches: the artifact stores of some stacks, and ZenML's runs on every stack that uses one of them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from zenml.client import Client
from zenml.enums import RunWaitConditionStatus, StackComponentType
from zenml.models import PipelineRunResponse
from zenml.stack import Stack

from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.errors import InvalidWorkerSettings, RunNotFound
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.store import Store
from kitaru_zenml.runs import find_run

PAGE = 200
UNFINISHED = ("initializing", "provisioning", "queued", "running", "paused", "resuming")


@dataclass(frozen=True)
class Watched:
    """An artifact store, as a component of ZenML."""

    component: UUID
    name: str
    store: Store


def open_watched(stacks: Collection[str]) -> list[Watched]:
    """The artifact stores of some stacks; of the active one if none is named.

    Raises:
        InvalidWorkerSettings: If there is no such stack.
        KitaruError: If its store cannot be used.
    """
    client, found = Client(), dict[UUID, Watched]()
    for name in stacks or (client.active_stack_model.name,):
        try:
            model = client.get_stack(name, allow_name_prefix_match=False)
        except KeyError:
            raise InvalidWorkerSettings(f"there is no stack `{name}`; list them with `zenml stack list`") from None
        component = model.components[StackComponentType.ARTIFACT_STORE][0]
        if component.id not in found:
            found[component.id] = Watched(component.id, component.name, open_store(Stack.from_model(model).artifact_store))
    return list(found.values())


class Runs:
    """ZenML's runs, as far as they keep their journals in a watched store."""

    def __init__(self, watched: Collection[Watched]) -> None:
        self._watched = {w.component: w for w in watched}

    def find(self, run_id: str | UUID) -> PipelineRunResponse | None:
        """The run, or `None` if this ZenML has none of this id in the active project."""
        try:
            run = find_run(UUID(str(run_id)))
        except (RunNotFound, ValueError):
            return None
        return run if run.project_id == Client().active_project.id else None

    def journal(self, run: PipelineRunResponse) -> Journal | None:
        """Its journal, or `None` if its store is not watched."""
        stack = run.snapshot.stack if run.snapshot else None
        if stack is None:
            return None
        watched = self._watched.get(stack.components[StackComponentType.ARTIFACT_STORE][0].id)
        return None if watched is None else Journal(watched.store, str(run.id))

    def journal_of(self, run_id: UUID) -> Journal | None:
        """`journal` by the run's id."""
        run = self.find(run_id)
        return None if run is None else self.journal(run)

    def unfinished(self) -> Iterator[tuple[PipelineRunResponse, Watched]]:
        """Every run that has not ended, the newest first, without its details."""
        for watched in self._watched.values():
            stacks = Client().list_stacks(component_id=watched.component, size=PAGE)
            for stack in stacks.items:
                yield from ((run, watched) for run in self._unfinished_on(stack.id))

    def _unfinished_on(self, stack: UUID) -> Iterator[PipelineRunResponse]:
        query: dict[str, Any] = {"stack_id": stack, "status": f"oneof:{json.dumps(UNFINISHED)}", "sort_by": "asc:created"}
        total = Client().list_pipeline_runs(**query, size=1).total
        for page in range(
            math.ceil(total / PAGE), 0, -1
        ):  # from the last: what ends moves others forward, so that none is missed
            try:
                found = Client().list_pipeline_runs(**query, page=page, size=PAGE)
            except ValueError:  # there are not so many pages any more
                continue
            yield from reversed(found.items)

    def not_ended(self, ids: Collection[str]) -> set[str]:
        """Of some run ids, those of runs that have not ended; one that is not in ZenML any more has."""
        left, found = sorted(ids), set[str]()
        while left:
            some, left = left[:PAGE], left[PAGE:]
            page = Client().list_pipeline_runs(id=f"oneof:{json.dumps(some)}", size=PAGE)
            found.update(str(run.id) for run in page.items if not run.status.is_finished)
        return found

    def asked(self) -> set[str]:
        """Ids of the runs that have a pending question in ZenML."""
        found: set[str] = set()
        query: dict[str, Any] = {"status": RunWaitConditionStatus.PENDING.value, "sort_by": "asc:created"}
        total = Client().list_run_wait_conditions(**query, size=1).total
        for page in range(math.ceil(total / PAGE), 0, -1):
            try:
                some = Client().list_run_wait_conditions(**query, page=page, size=PAGE, hydrate=True)
            except ValueError:
                continue
            found.update(str(condition.run.id) for condition in some.items)
        return found
