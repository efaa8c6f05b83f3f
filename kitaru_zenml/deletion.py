"""`delete`: removes a run's journal, its artifacts and its ZenML run, unless a fork needs them or somebody executes it.

The note that the run is being deleted is the first object of a deletion and the last to go. A fork stores its marker and then looks for
that note; a deletion stores the note and then looks for markers: so at least one of the two sees the other. Whatever a kill leaves, the
note keeps the run from being resumed, and a second `delete` finds it and finishes.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from uuid import UUID

from zenml.client import Client
from zenml.models import ArtifactVersionFilter, PipelineRunResponse

from kitaru_zenml.artifact_store import open_store
from kitaru_zenml.errors import RunHasForks, RunNotFound
from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.lease import take_lease
from kitaru_zenml.journal.records import Deletion, deletion_name, fork_name, marker_name, run_folder, seal
from kitaru_zenml.journal.store import ObjectNotFound
from kitaru_zenml.options import FlowOptions
from kitaru_zenml.runs import artifact_store_of, find_run, flow_options

PAGE = 100


def delete(run: str | UUID) -> str:
    """Delete a run for good: journal, artifacts and ZenML run.

    Args:
        run: Id, unambiguous prefix or name.

    Returns:
        The run's id.

    Raises:
        RunNotFound: If there is no such run, nor anything left of one.
        RunHasForks: If a fork needs its records.
        RunIsLeased: If somebody executes it.
    """
    try:
        found = find_run(run)
    except RunNotFound:
        return _finish(str(run))
    journal = Journal(open_store(artifact_store_of(found)), str(found.id))
    refuse_forks(journal)
    if not _is_noted(journal):
        _note(found, journal)
    fork = journal.fork()
    erase(journal, fork.needs if fork is not None else _origin_of(found))
    return str(found.id)


def _note(found: PipelineRunResponse, journal: Journal) -> None:
    """Make sure that nobody executes the run, now or later, and that no fork begins to need it."""
    options = flow_options(found) or FlowOptions()
    lease = take_lease(journal, purpose="delete", lapse_seconds=options.lapse_seconds, wait=True)
    note = Deletion(nonce=new_nonce(), run_id=journal.run_id, at=datetime.now(UTC), by=Client().active_user.name)
    journal.store.create(deletion_name(journal.run_id), seal(note))
    try:
        refuse_forks(journal)
    except RunHasForks:
        journal.store.delete([deletion_name(journal.run_id)])
        lease.release()
        raise


def _origin_of(found: PipelineRunResponse) -> Sequence[str]:
    return (str(found.original_run.id),) if found.original_run is not None else ()


def refuse_forks(journal: Journal) -> None:
    """Refuse to go on while a fork needs the run. A marker whose fork was deleted counts no more, and is removed.

    Raises:
        RunHasForks: Naming them.
    """
    forks = journal.forks()
    alive = [fork for fork in forks if _is_there(journal, fork)]
    if alive:
        raise RunHasForks(journal.run_id, alive)
    journal.store.delete(marker_name(journal.run_id, fork) for fork in forks)


def _is_there(journal: Journal, fork: str) -> bool:
    """Whether anything is left of a fork that could still run or be read."""
    try:
        Client().get_pipeline_run(UUID(fork), allow_name_prefix_match=False, hydrate=False)
    except KeyError:
        return bool(_get(journal, fork_name(fork)))
    return True


def erase(journal: Journal, needs: Sequence[str]) -> None:
    """Remove all that is left of a run, such that a kill in between loses nothing another run needs.

    Args:
        journal: Of the run.
        needs: The runs in whose journals it has left markers.
    """
    run_id, store = journal.run_id, journal.store
    last = (deletion_name(run_id), fork_name(run_id))  # they say what remains to be done
    store.delete(name for name in store.list(run_folder(run_id)) if name not in last)
    store.delete(store.list(f"kitaru/artifacts/{run_id}/"))
    try:
        Client().zen_store.delete_run(UUID(run_id))
    except KeyError:
        pass
    _forget_artifacts(journal)
    store.delete(marker_name(of, run_id) for of in needs)
    store.delete([fork_name(run_id)])
    store.delete([deletion_name(run_id)])


def _forget_artifacts(journal: Journal) -> None:
    """Remove the artifact versions of the run from ZenML, but for those that a pipeline of somebody else has taken in."""
    zen = Client().zen_store
    query = ArtifactVersionFilter(
        uri=f"startswith:{journal.store.uri.rstrip('/')}/kitaru/artifacts/{journal.run_id}/", only_unused=True, size=PAGE
    )
    while found := zen.list_artifact_versions(query).items:
        for version in found:
            zen.delete_artifact_version(version.id)


def _finish(run: str) -> str:
    """Finish a deletion that was cut short after ZenML's run was gone."""
    try:
        run_id = str(UUID(run))
    except ValueError:
        raise RunNotFound(run) from None
    journal = Journal(open_store(Client().active_stack.artifact_store), run_id)
    if not _is_noted(journal):
        raise RunNotFound(run)
    fork = journal.fork()
    erase(journal, fork.needs if fork is not None else ())
    return run_id


def _is_noted(journal: Journal) -> bool:
    return bool(_get(journal, deletion_name(journal.run_id)))


def _get(journal: Journal, name: str) -> bytes:
    try:
        return journal.store.get(name)
    except ObjectNotFound:
        return b""
