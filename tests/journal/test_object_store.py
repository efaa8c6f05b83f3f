"""The object store when the endpoint misbehaves."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kitaru_zenml.artifact_store import probe_conditional
from kitaru_zenml.checkpoints import checkpoint
from kitaru_zenml.errors import BucketNotFound, StoreAccessDenied, StoreNotConditional, StoreUnavailable
from kitaru_zenml.journal.object_store import ObjectStore
from kitaru_zenml_stacks import loopback
from tests.conftest import s3_store
from tests.faults import Faults, faulty
from tests.simulation import run_leg


@pytest.fixture
def faults(moto: loopback.S3) -> Iterator[tuple[str, Faults]]:
    with faulty(moto.endpoint) as proxy:
        yield proxy


@pytest.fixture
def store(moto: loopback.S3, faults: tuple[str, Faults], request: pytest.FixtureRequest) -> ObjectStore:
    return s3_store(moto, f"faults-{time.monotonic_ns()}", endpoint=faults[0], patience=6)


def test_a_create_that_was_committed_with_its_reply_lost_is_ours(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    faults[1].lose_replies_of = lambda method, path: method == "PUT"
    assert store.create("kitaru/r/a", b"mine, nonce 1") is None
    assert asyncio.run(store.create_async("kitaru/r/b", b"mine, nonce 2")) is None
    assert {status for method, _, status in faults[1].seen if method == "PUT"} >= {500, 412}, "the fault did not strike"
    faults[1].lost.clear()
    assert store.create("kitaru/r/a", b"theirs, nonce 3") == b"mine, nonce 1"


def test_a_run_whose_every_create_loses_its_reply_once_goes_through(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    ran = []

    @checkpoint
    def step(i: int) -> int:
        ran.append(i)
        return i

    faults[1].lose_replies_of = lambda method, path: method == "PUT"
    ended, execution = run_leg(store, lambda: [step(i) for i in range(5)])  # type: ignore[arg-type]
    assert ended.value == [0, 1, 2, 3, 4] and ran == [0, 1, 2, 3, 4]
    assert len(faults[1].lost) >= 6 and execution.lease.lost is None


@pytest.mark.parametrize("status", [500, 503])
def test_a_store_that_fails_for_a_while_is_waited_for(store: ObjectStore, faults: tuple[str, Faults], status: int) -> None:
    failing = iter([status, status, None])
    faults[1].refuse = lambda method, path: next(failing, None)
    assert store.create("kitaru/r/a", b"x") is None
    assert store.get("kitaru/r/a") == b"x"


def test_a_store_that_fails_for_good_is_said_in_time(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    faults[1].refuse = lambda method, path: 503
    began = time.monotonic()
    with pytest.raises(StoreUnavailable, match="kitaru resume") as caught:
        store.create("kitaru/r/a", b"x")
    assert type(caught.value) is StoreUnavailable and time.monotonic() - began < 30


def test_a_slow_store_is_waited_for(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    faults[1].delay = lambda method, path: 2.0 if method == "PUT" else 0
    assert store.create("kitaru/r/a", b"x") is None


def test_a_create_that_timed_out_is_sent_again_and_is_ours(moto: loopback.S3, faults: tuple[str, Faults]) -> None:
    store = s3_store(moto, f"hang-{time.monotonic_ns()}", endpoint=faults[0], patience=20, read_timeout=1.0)
    hanging = iter([3.0])  # the late first request finds the object of the second
    faults[1].delay = lambda method, path: next(hanging, 0.0) if method == "PUT" else 0.0
    assert store.create("kitaru/r/a", b"mine, nonce 1") is None
    assert next(hanging, None) is None, "the fault did not strike"
    hanging = iter([3.0])
    assert asyncio.run(store.create_async("kitaru/r/b", b"mine, nonce 2")) is None
    assert next(hanging, None) is None, "the fault did not strike"


def test_a_store_that_never_answers_is_said_in_time(moto: loopback.S3, faults: tuple[str, Faults]) -> None:
    store = s3_store(moto, f"silent-{time.monotonic_ns()}", endpoint=faults[0], patience=2, read_timeout=1.0)
    faults[1].delay = lambda method, path: 3.0
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        store.create("kitaru/r/a", b"x")
    assert time.monotonic() - began < 8


def test_a_conflict_with_a_create_that_is_being_decided_is_tried_again(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    conflicts = iter([409, None, 409, None, 409, None])  # of each PUT and the GET after it
    faults[1].refuse = lambda method, path: next(conflicts, None)
    assert store.create("kitaru/r/a", b"x") is None
    conflicts = iter([409, None])
    assert asyncio.run(store.create_async("kitaru/r/b", b"x")) is None


def test_a_conflict_that_never_ends_is_asked_about_with_pauses(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    faults[1].refuse = lambda method, path: 409 if method == "PUT" else None
    with pytest.raises(StoreUnavailable):
        store.create("kitaru/r/a", b"x")
    assert len(faults[1].seen) < 60


@pytest.mark.parametrize("name", ["load-credentials", "AccessDenied", "NoSuchBucket", "ExpiredToken"])
def test_an_outage_is_not_mistaken_for_something_else_by_a_steps_name(
    store: ObjectStore, faults: tuple[str, Faults], name: str
) -> None:
    store._patience = 0.5
    faults[1].refuse = lambda method, path: 400 if method == "PUT" else None
    with pytest.raises(StoreUnavailable) as caught:
        store.create(f"kitaru/r/steps/{name}-1.json", b"x")
    assert type(caught.value) is StoreUnavailable


def test_an_endpoint_without_conditional_writes_is_said(moto: loopback.S3, faults: tuple[str, Faults]) -> None:
    store = s3_store(moto, f"old-{time.monotonic_ns()}", endpoint=faults[0], patience=1)
    faults[1].refuse = lambda method, path: 501 if method == "PUT" else None
    with pytest.raises(StoreNotConditional):
        store.create("kitaru/r/a", b"x")


def test_an_endpoint_that_is_not_there_is_said(moto: loopback.S3) -> None:
    with pytest.raises(StoreUnavailable):
        s3_store(moto, "p", endpoint=f"http://127.0.0.1:{loopback.free_port()}", patience=2).create("a", b"x")


def test_a_missing_bucket_is_said(moto: loopback.S3) -> None:
    gone = s3_store(loopback.S3(moto.endpoint, moto.access_key, moto.secret_key, "no-such-bucket"), "p", patience=2)
    for action in (lambda: gone.create("a", b"x"), lambda: gone.get("a"), lambda: gone.list("kitaru/")):
        with pytest.raises(BucketNotFound):
            action()


@pytest.mark.ceph
def test_wrong_keys_are_said(ceph: loopback.S3) -> None:
    denied = s3_store(loopback.S3(ceph.endpoint, "k", "wrong", ceph.bucket), "p", patience=2)
    for action in (lambda: denied.create("a", b"x"), lambda: denied.get("a"), lambda: denied.list("kitaru/")):
        with pytest.raises(StoreAccessDenied):
            action()


def test_a_store_that_ignores_the_condition_is_refused(store: ObjectStore, faults: tuple[str, Faults]) -> None:
    faults[1].drop_headers = ("if-none-match",)
    with pytest.raises(StoreNotConditional, match="If-None-Match"):
        probe_conditional(store)


RACER = """
import sys
from kitaru_zenml_stacks.loopback import S3
from tests.conftest import s3_store
store = s3_store(S3(*sys.argv[1:5]), sys.argv[5])
store.list("kitaru/")
print("ready", flush=True)
sys.stdin.readline()
print(*(n for n in range(30) if store.create(f"kitaru/r/{n}", f"{sys.argv[6]} {n}".encode()) is None))
"""


def test_of_racing_processes_one_wins_each_object(moto: loopback.S3) -> None:
    prefix = f"race-{time.monotonic_ns()}"
    where = [moto.endpoint, moto.access_key, moto.secret_key, moto.bucket, prefix]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, *where, str(i)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for i in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    won = {}
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for i, racer in enumerate(racers):
        won[i] = [int(n) for n in racer.communicate()[0].split()]
    assert sorted(n for names in won.values() for n in names) == list(range(30))
    store = s3_store(moto, prefix)
    assert all(store.get(f"kitaru/r/{n}") == b"%d %d" % (i, n) for i, names in won.items() for n in names)


def test_a_thousand_small_objects_are_read_within_seconds(moto: loopback.S3, tmp_path: Path) -> None:
    store = s3_store(moto, f"many-{time.monotonic_ns()}")

    async def fill() -> None:
        await asyncio.gather(*(store.create_async(f"kitaru/r/{i:04d}", b"x" * 1000) for i in range(1000)))

    asyncio.run(fill())
    names = store.list("kitaru/r/")
    assert len(names) == 1000 and None not in store.get_many(names)
