"""What every store keeps: one winner, whole objects, names in order."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from kitaru_zenml.artifact_store import probe_conditional
from kitaru_zenml.errors import StoreNotConditional
from kitaru_zenml.journal.store import ObjectNotFound, Store
from tests.simulation import MemoryStore


def test_the_first_create_wins_and_the_loser_gets_the_winners_bytes(store: Store) -> None:
    assert store.create("kitaru/r/steps/a.json", b"one") is None
    assert store.create("kitaru/r/steps/a.json", b"two") == b"one"
    assert store.get("kitaru/r/steps/a.json") == b"one"


def test_our_own_bytes_under_the_name_mean_that_we_won(store: Store) -> None:
    assert store.create("kitaru/r/x", b"mine") is None
    assert store.create("kitaru/r/x", b"mine") is None
    assert asyncio.run(store.create_async("kitaru/r/x", b"mine")) is None


def test_of_racing_threads_one_wins_and_all_agree(store: Store) -> None:
    with ThreadPoolExecutor(16) as pool:
        for n in range(10):
            answers = list(pool.map(lambda i, n=n: (i, store.create(f"kitaru/r/{n}", b"%d" % i)), range(16)))
            winners = [i for i, theirs in answers if theirs is None]
            assert len(winners) == 1
            assert {theirs for _, theirs in answers if theirs is not None} == {b"%d" % winners[0]}


def test_racing_async_creates_overlap_and_agree(store: Store) -> None:
    async def race() -> list[bytes | None]:
        return await asyncio.gather(*(store.create_async("kitaru/r/same", b"%d" % i) for i in range(16)))

    answers = asyncio.run(race())
    assert answers.count(None) == 1 and len({a for a in answers if a is not None}) == 1


def test_of_racing_processes_one_wins(store: Store, tmp_path: Any) -> None:
    children = []
    for i in range(6):
        pid = os.fork() if store.uri.startswith("/") else 0
        if pid == 0:
            if not store.uri.startswith(
                "/"
            ):  # obstore's threads do not survive a fork: the object stores race in threads above
                break
            won = store.create("kitaru/r/forked", b"%d" % i) is None
            os._exit(0 if won else 1)
        children.append(pid)
    if children:
        assert sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children) == [0, 1, 1, 1, 1, 1]


def test_a_listing_has_all_names_below_a_folder_in_order(store: Store) -> None:
    names = [f"kitaru/r/{part}/{i:03d}.json" for part in ("steps", "events") for i in range(30)]
    for name in names:
        store.create(name, b"x")
    store.create("kitaru/run-of-another/steps/1.json", b"x")
    assert store.list("kitaru/r/") == sorted(names)
    assert store.list("kitaru/r/events/") == sorted(names)[:30]
    assert store.list("kitaru/nobody/") == []


def test_many_objects_are_read_at_once_and_missing_ones_are_none(store: Store) -> None:
    for i in range(50):
        store.create(f"kitaru/r/{i}", b"%d" % i)
    names = [f"kitaru/r/{i}" for i in range(60)]
    assert store.get_many(names) == [b"%d" % i for i in range(50)] + [None] * 10
    assert store.get_many([]) == []


def test_reading_from_within_an_event_loop_works(store: Store) -> None:
    store.create("kitaru/r/1", b"x")

    async def read() -> Any:
        return store.get("kitaru/r/1"), store.get_many(["kitaru/r/1", "kitaru/r/2"])

    assert asyncio.run(read()) == (b"x", [b"x", None])


def test_an_object_that_is_not_there_is_said_so(store: Store) -> None:
    with pytest.raises(ObjectNotFound):
        store.get("kitaru/r/nothing")


def test_overwrite_replaces_and_delete_removes(store: Store) -> None:
    store.overwrite("kitaru/r/beat", b"1")
    store.overwrite("kitaru/r/beat", b"2")
    assert store.get("kitaru/r/beat") == b"2"
    store.delete(["kitaru/r/beat", "kitaru/r/never"])
    assert store.list("kitaru/r/") == []


def test_a_large_object_comes_back_whole(store: Store) -> None:
    data = os.urandom(3_000_000)
    assert store.create("kitaru/r/blob", data) is None
    assert store.get("kitaru/r/blob") == data


def test_async_creates_leave_the_loop_free(store: Store) -> None:
    async def main() -> float:
        longest, stop = 0.0, False

        async def watch() -> None:
            nonlocal longest
            while not stop:
                began = time.perf_counter()
                await asyncio.sleep(0.001)
                longest = max(longest, time.perf_counter() - began)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(store.create_async(f"kitaru/r/{i}", b"x" * 50_000) for i in range(32)))
        stop = True
        await watcher
        return longest

    assert asyncio.run(main()) < 0.5


def test_the_probe_passes_and_leaves_nothing(store: Store) -> None:
    probe_conditional(store)
    assert store.list("kitaru/") == []


def test_a_store_that_overwrites_is_refused() -> None:
    class Forgetful(MemoryStore):
        def _commit(self, name: str, data: bytes) -> bytes | None:
            self.objects[name] = data
            return None

    with pytest.raises(StoreNotConditional, match="overwrote"):
        probe_conditional(Forgetful())
