"""Who may execute a run now."""

from __future__ import annotations

import threading
import time

import pytest

from kitaru_zenml.errors import LeaseLost, RunIsLeased
from kitaru_zenml.journal import lease as leases
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.records import Holder, seal
from tests.simulation import MemoryStore


def journal(store: MemoryStore | None = None) -> Journal:
    return Journal(store or MemoryStore(), "run")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases are taken as if by a process on another host, of which nobody here can tell whether it lives."""
    holders = iter(range(1000))
    monkeypatch.setattr(leases, "this_process", lambda: Holder(host="far", boot=f"far {next(holders)}", pid=1, started=0))


def test_a_second_executor_is_refused_while_the_first_lives() -> None:
    run = journal()
    held = leases.take_lease(run, purpose="run")
    held.beat()
    with pytest.raises(RunIsLeased) as caught:
        leases.take_lease(run, purpose="run")
    assert caught.value.epoch == 1 and caught.value.until is not None and "process" in caught.value.holder


def test_a_released_lease_is_taken_at_once() -> None:
    run = journal()
    leases.take_lease(run, purpose="run").release()
    assert leases.take_lease(run, purpose="resume").epoch == 2


def test_a_takeover_supersedes_and_the_first_finds_out() -> None:
    run = journal()
    first = leases.take_lease(run, purpose="run")
    second = leases.take_lease(run, purpose="resume", takeover=True)
    with pytest.raises(LeaseLost):
        first.check()
    second.check()
    first.release()  # says nothing about an epoch that is not its own
    with pytest.raises(RunIsLeased):
        leases.take_lease(run, purpose="run")


@pytest.mark.usefixtures("elsewhere")
def test_a_beat_that_stands_still_lapses_by_the_takers_clock() -> None:
    run = journal()
    leases.take_lease(run, purpose="run", lapse_seconds=0.3).beat()
    with pytest.raises(RunIsLeased):
        leases.take_lease(run, purpose="run", lapse_seconds=0.3)
    waited: list[float] = []
    began = time.monotonic()
    assert leases.take_lease(run, purpose="resume", wait=True, on_wait=lambda lease, left: waited.append(left)).epoch == 2
    assert 0.25 < time.monotonic() - began < 2 and waited


@pytest.mark.usefixtures("elsewhere")
def test_a_beat_that_moves_is_not_waited_for() -> None:
    run = journal()
    held = leases.take_lease(run, purpose="run", lapse_seconds=5)
    held.beat()
    threading.Timer(0.2, held.beat).start()
    began = time.monotonic()
    with pytest.raises(RunIsLeased):
        leases.take_lease(run, purpose="resume", wait=True)
    assert time.monotonic() - began < 2


@pytest.mark.usefixtures("elsewhere")
def test_of_many_takers_one_wins() -> None:
    store, won, lost = MemoryStore(), [], []
    leases.take_lease(journal(store), purpose="run").release()

    def take() -> None:
        try:
            won.append(leases.take_lease(journal(store), purpose="resume").epoch)
        except RunIsLeased as error:
            lost.append(error.epoch)

    threads = [threading.Thread(target=take) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert won == [2] and lost == [2] * 15


def test_a_lease_whose_holder_is_a_dead_process_of_this_host_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    run, me = journal(), leases.this_process()
    held = leases.take_lease(run, purpose="run")
    dead = held.lease.model_copy(update={"holder": me.model_copy(update={"pid": 2**22 - 3})})
    run.store.objects["kitaru/run/lease/000001.json"] = seal(dead)  # type: ignore[attr-defined]
    assert leases.take_lease(run, purpose="resume").epoch == 2


def test_a_reused_pid_is_not_the_holder() -> None:
    me = leases.this_process()
    assert not leases.is_gone(me)
    assert leases.is_gone(me.model_copy(update={"started": me.started - 1000}))
    assert not leases.is_gone(me.model_copy(update={"boot": "other", "pid": 2**22 - 3}))


def test_a_process_that_was_held_up_knows_that_it_must_look() -> None:
    held = leases.take_lease(journal(), purpose="run", lapse_seconds=1)
    assert not held.is_stale
    held.checked_at -= 10
    assert held.is_stale
    held.check()
    assert not held.is_stale
