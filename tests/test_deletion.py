"""Deleting runs: what is refused, what is left, and what a crash in between leaves."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from zenml.client import Client

from kitaru_zenml import deletion
from kitaru_zenml.deletion import delete
from kitaru_zenml.errors import RunBeingDeleted, RunHasForks, RunIsLeased, RunNotFound
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.lease import take_lease
from kitaru_zenml.journal.records import deletion_name, marker_folder
from kitaru_zenml.journal.store import Store
from kitaru_zenml.runs import find_run, open_journal
from tests import flows_of_forks as flows


def left_of(store: Store, run_id: str) -> list[str]:
    return [*store.list(f"kitaru/{run_id}/"), *store.list(f"kitaru/artifacts/{run_id}/")]


def versions_of(run_id: str) -> int:
    return int(Client().list_artifact_versions(uri=f"contains:{run_id}", size=1).total)


def test_nothing_is_left_of_a_deleted_run() -> None:
    run_id = flows.support.run(2).id
    store = open_journal(find_run(run_id)).store
    assert left_of(store, run_id) and versions_of(run_id) == 5
    assert delete(run_id) == run_id
    assert left_of(store, run_id) == [] and versions_of(run_id) == 0
    for verb in (find_run, delete):
        with pytest.raises(RunNotFound):
            verb(run_id)


def test_a_run_is_not_deleted_while_a_fork_needs_it() -> None:
    origin = flows.support.run(2).id
    first = flows.support.replay(origin, overrides={"judge#0": {"kind": "reject"}}).id
    second = flows.support.replay(first, from_="sign#0").id
    store = open_journal(find_run(origin)).store
    with pytest.raises(RunHasForks) as refused:
        delete(origin)
    assert set(refused.value.forks) == {first, second} and first in str(refused.value)
    with pytest.raises(RunHasForks, match=second):
        delete(first)
    assert flows.support.replay(origin, from_="sign#0").status == "completed"  # a refused deletion leaves nothing behind
    delete(second)
    with pytest.raises(RunHasForks):
        delete(origin)
    for fork in [name.rpartition("/")[2].removesuffix(".json") for name in store.list(marker_folder(origin))]:
        delete(fork)
    assert store.list(marker_folder(origin)) == []
    assert open_journal(find_run(origin)).load().records
    delete(origin)
    assert left_of(store, origin) == []


def test_a_live_run_is_not_deleted() -> None:
    run_id = flows.support.run(1).id
    journal = open_journal(find_run(run_id))
    lease, stop = take_lease(journal, purpose="resume", lapse_seconds=60), threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            lease.beat()

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(RunIsLeased):
            delete(run_id)
    finally:
        stop.set()
        beating.join()
        lease.release()
    assert open_journal(find_run(run_id)).load().records
    delete(run_id)


def test_no_fork_is_made_of_a_run_that_is_being_deleted() -> None:
    origin = flows.support.run(1).id
    journal = open_journal(find_run(origin))
    journal.store.create(deletion_name(origin), b"noted")
    runs = Client().list_pipeline_runs(size=1).total
    with pytest.raises(RunBeingDeleted, match="kitaru delete"):
        flows.support.replay(origin, from_="sign#0")
    assert Client().list_pipeline_runs(size=1).total == runs and journal.store.list(marker_folder(origin)) == []
    delete(origin)


def test_a_deletion_that_begins_while_a_fork_is_made_stops_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    origin = flows.support.run(1).id
    journal = open_journal(find_run(origin))
    real = Journal.load

    def load_and_delete(self: Journal, *args: Any) -> Any:
        snapshot = real(self, *args)
        self.store.create(deletion_name(origin), b"noted")
        return snapshot

    monkeypatch.setattr(Journal, "load", load_and_delete)
    runs = Client().list_pipeline_runs(size=1).total
    with pytest.raises(RunBeingDeleted):
        flows.support.replay(origin, from_="sign#0")
    assert Client().list_pipeline_runs(size=1).total == runs and journal.store.list(marker_folder(origin)) == []


class Crash(BaseException):
    """The process that deletes is dead."""


class CrashingStore:
    """A store whose user dies before or after its operation number `at`."""

    def __init__(self, inner: Store, at: int, when: str) -> None:
        self.inner, self.at, self.when, self.count = inner, at, when, 0
        self.uri = inner.uri

    def _around(self, work: Any) -> Any:
        self.count += 1
        if self.count == self.at and self.when == "before":
            raise Crash
        try:
            return work()
        finally:
            if self.count == self.at:
                raise Crash

    def create(self, name: str, data: bytes) -> Any:
        return self._around(lambda: self.inner.create(name, data))

    def overwrite(self, name: str, data: bytes) -> Any:
        return self._around(lambda: self.inner.overwrite(name, data))

    def get(self, name: str) -> Any:
        return self._around(lambda: self.inner.get(name))

    def get_many(self, names: Sequence[str]) -> Any:
        return self._around(lambda: self.inner.get_many(names))

    def list(self, prefix: str) -> Any:
        return self._around(lambda: self.inner.list(prefix))

    def delete(self, names: Iterable[str]) -> Any:
        return self._around(lambda: self.inner.delete(list(names)))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_second_deletion_finishes_what_a_crash_left_of_the_first(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    origin = flows.support.run(1).id
    store, real, at, crashed = open_journal(find_run(origin)).store, deletion.open_store, 0, True
    while crashed:
        at += 1
        fork = flows.support.replay(origin, overrides={"judge#0": {"kind": "reject"}}).id
        crashing = CrashingStore(store, at, when)
        monkeypatch.setattr(deletion, "open_store", lambda _, crashing=crashing: crashing)
        try:
            delete(fork)
            crashed = False
        except Crash:
            pass
        monkeypatch.setattr(deletion, "open_store", real)
        if crashed:
            try:
                delete(fork)
            except RunNotFound:  # there was nothing left to do
                pass
        assert left_of(store, fork) == [] and versions_of(fork) == 0, f"crash {when} operation {at}"
        assert store.list(marker_folder(origin)) == [], f"crash {when} operation {at}"
        with pytest.raises(RunNotFound):
            find_run(fork)
    assert at > 8
    assert len(open_journal(find_run(origin)).load().records) == 5
