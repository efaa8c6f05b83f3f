"""What one durable call does: retries, failures, timeouts, drift, doubt, values that cannot be stored. Real engine, store in memory."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from kitaru_zenml.checkpoints import checkpoint, current_step
from kitaru_zenml.errors import (
    InputsDrifted,
    InvalidStepName,
    NotDurableError,
    RecordedFailure,
    StepInDoubt,
    StepTimeout,
)
from kitaru_zenml.journal.journal import Journal
from kitaru_zenml.journal.lease import take_lease
from kitaru_zenml.journal.records import Reopened, RetryEvent, StepRecord
from kitaru_zenml.options import FlowOptions, StepOptions
from kitaru_zenml.recorded import now, random, uuid4
from kitaru_zenml.resumption import _reopen, in_doubt, refuse_doubt
from tests.simulation import Crash, MemoryStore, run_leg

ran: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_ran() -> None:
    ran.clear()


def records(store: MemoryStore) -> dict[str, StepRecord]:
    return {r.display: r for r in Journal(store, "run").load().records.values()}


def resume(store: MemoryStore, flow: Any, parameters: dict[str, Any] | None = None, **options: Any) -> Any:
    """What `kitaru resume` does to the journal, and the leg that follows."""
    journal = Journal(store, "run")
    lease = take_lease(journal, purpose="resume", takeover=True)
    snapshot = journal.load()
    refuse_doubt(snapshot, "run")
    _reopen(journal, snapshot, lease, None, options.pop("retry", ()))
    return run_leg(store, flow, parameters, **options)[0]


def test_a_step_is_tried_again_and_its_failed_attempts_are_kept() -> None:
    @checkpoint(retries=3, retry_delay=0.001, retry_on=ConnectionError)
    def flaky() -> str:
        ran.append("x")
        if len(ran) < 3:
            raise ConnectionError(f"try {len(ran)}")
        return f"attempt {current_step().attempt}"

    store = MemoryStore()
    ended, _ = run_leg(store, lambda: flaky())
    assert ended.value == "attempt 3"
    assert [a.failure.message for a in records(store)["flaky#0"].attempts] == ["try 1", "try 2"]


def test_a_failure_outside_retry_on_is_not_tried_again() -> None:
    @checkpoint(retries=3, retry_delay=0.001, retry_on=ConnectionError)
    def broken() -> None:
        ran.append("x")
        raise ValueError("no use")

    ended, _ = run_leg(MemoryStore(), lambda: broken())
    assert isinstance(ended.error, ValueError) and ran == ["x"]


def test_delays_grow_up_to_their_limit() -> None:
    options = StepOptions(retries=5, retry_delay=1, retry_backoff=3, retry_max_delay=5)
    delays = [options.delay_before(n) for n in (1, 2, 3)]
    assert all(low <= d <= low * 1.1 for d, low in zip(delays, (1, 3, 5), strict=True))


def test_the_idempotency_key_is_the_same_for_each_attempt_and_leg_and_differs_between_calls() -> None:
    keys: list[str] = []

    @checkpoint(retries=1, retry_delay=0.001)
    def charge(amount: int) -> int:
        keys.append(current_step().idempotency_key)
        if len(keys) in (1, 2):
            raise ConnectionError
        return amount

    def flow() -> list[int]:
        return [charge(1), charge(1), charge(2)]

    store = MemoryStore()
    ended, _ = run_leg(store, flow)
    assert isinstance(ended.error, ConnectionError)
    assert resume(store, flow).value == [1, 1, 2]
    assert keys[0] == keys[1] == keys[2] and len(set(keys[2:])) == 3


@pytest.mark.parametrize("is_async", [False, True])
def test_an_attempt_that_takes_too_long_fails_with_a_timeout(is_async: bool) -> None:
    @checkpoint(timeout=0.05)
    def slow() -> None:
        time.sleep(0.5)

    @checkpoint(timeout=0.05, name="slow")
    async def slow_async() -> None:
        await asyncio.sleep(0.5)

    async def flow() -> None:
        await slow_async()

    began = time.monotonic()
    ended, _ = run_leg(MemoryStore(), flow if is_async else lambda: slow())
    assert isinstance(ended.error, StepTimeout) and ended.error.seconds == 0.05
    assert time.monotonic() - began < 0.4


def test_a_failure_that_the_flow_caught_replays_as_that_failure() -> None:
    @checkpoint
    def broken(x: int) -> None:
        ran.append("broken")
        raise LookupError("not there", x)

    @checkpoint
    def after(what: str) -> str:
        ran.append("after")
        return what

    def flow() -> str:
        try:
            broken(1)
        except LookupError as error:
            return after(f"{type(error).__name__} {error.args}")
        return "nothing"

    store = MemoryStore(crash_after=1)
    with pytest.raises(Crash):
        run_leg(store, flow)
    ended = resume(MemoryStore(store.objects), flow)
    assert ended.value == "LookupError ('not there', 1)"
    assert ran == ["broken", "after", "after"]


def test_a_failure_that_ended_the_run_is_tried_again_by_resume_and_finished_steps_are_not() -> None:
    @checkpoint
    def good(x: int) -> int:
        ran.append(f"good {x}")
        return x

    @checkpoint
    def moody() -> str:
        ran.append("moody")
        if ran.count("moody") < 3:
            raise OSError("not today")
        return "fine"

    def flow() -> Any:
        return good(1), moody(), good(2)

    store = MemoryStore()
    assert isinstance(run_leg(store, flow)[0].error, OSError)
    assert isinstance(resume(store, flow).error, OSError)
    assert resume(store, flow).value == (1, "fine", 2)
    assert ran == ["good 1", "moody", "moody", "moody", "good 2"]
    assert records(store)["moody#0"].generation in (0, 1, 2)


def test_the_cause_of_the_exception_that_ended_the_run_is_tried_again() -> None:
    @checkpoint
    def moody() -> str:
        ran.append("moody")
        if len(ran) < 2:
            raise OSError("not today")
        return "fine"

    def flow() -> str:
        try:
            return moody()
        except OSError as error:
            raise RuntimeError("the audit failed") from error

    store = MemoryStore()
    assert isinstance(run_leg(store, flow)[0].error, RuntimeError)
    assert resume(store, flow).value == "fine"


def test_a_caught_failure_stays_unless_it_is_named() -> None:
    @checkpoint
    def moody() -> str:
        ran.append("moody")
        if len(ran) < 2:
            raise OSError("not today")
        return "fine"

    def flow() -> str:
        try:
            return moody()
        except OSError:
            pass
        raise RuntimeError("something else")

    store = MemoryStore()
    run_leg(store, flow)
    assert isinstance(resume(store, flow).error, RuntimeError) and ran == ["moody"]
    assert resume(store, flow, retry=("moody#0",)).value == "fine"


def test_a_retried_step_does_not_repeat_what_finished_inside_it() -> None:
    @checkpoint
    def inner(x: str) -> str:
        ran.append(x)
        if x == "second" and ran.count(x) < 2:
            raise OSError("not today")
        return x

    @checkpoint(retries=1, retry_delay=0.001)
    def outer() -> list[str]:
        return [inner("first"), inner("second")]

    store = MemoryStore()
    ended, _ = run_leg(store, lambda: outer())
    assert ended.value == ["first", "second"] and ran == ["first", "second", "second"]


def test_a_crash_between_attempts_repeats_nothing_that_finished() -> None:
    @checkpoint
    def inner(x: str) -> str:
        ran.append(x)
        if x == "second" and ran.count(x) < 2:
            raise OSError("not today")
        return x

    @checkpoint(retries=1, retry_delay=0.001)
    def outer() -> list[str]:
        return [inner("first"), inner("second"), inner("third")]

    for crash_after in range(5):
        ran.clear()
        store = MemoryStore(crash_after=crash_after)
        with pytest.raises(Crash):
            run_leg(store, lambda: outer())
        ended = resume(MemoryStore(store.objects), lambda: outer())
        assert ended.value == ["first", "second", "third"]
        assert ran.count("first") <= (2 if crash_after == 0 else 1)


def test_an_exception_whose_class_is_not_imported_replays_as_recorded_failure() -> None:
    class Local(Exception):
        pass

    @checkpoint
    def broken() -> None:
        raise Local("gone")

    ended, _ = run_leg(MemoryStore(), lambda: broken())
    assert isinstance(ended.error, RecordedFailure) and ended.error.message == "gone"


def test_a_cancelled_step_is_not_recorded() -> None:
    @checkpoint
    async def slow() -> None:
        await asyncio.sleep(10)

    async def flow() -> str:
        task = asyncio.create_task(slow())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return "went on"

    store = MemoryStore()
    assert run_leg(store, flow)[0].value == "went on"
    assert list(records(store)) == ["simulated#0"]


def test_a_cancellation_while_the_outcome_is_stored_keeps_it() -> None:
    @checkpoint
    async def quick() -> int:
        ran.append("quick")
        return 1

    class SlowStore(MemoryStore):
        async def create_async(self, name: str, data: bytes) -> bytes | None:
            await asyncio.sleep(0.05)
            return await super().create_async(name, data)

    async def flow() -> None:
        task = asyncio.create_task(quick())
        await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    store = SlowStore()
    assert run_leg(store, flow)[0].error is None
    assert "quick#0" in records(store) and ran == ["quick"]


# --- inputs that drift ---------------------------------------------------------------------------------------------------


@checkpoint
def stamp(url: str, today: str) -> str:
    ran.append(today)
    return f"{url} as of {today}"


@checkpoint
def last(x: str) -> str:
    return x


def drifted(today: list[str], step: Any = stamp) -> tuple[MemoryStore, Any]:
    def flow() -> str:
        return last(step("page", today[0]))

    store = MemoryStore(crash_after=1)
    with pytest.raises(Crash):
        run_leg(store, flow)
    today[0] = "Tuesday"
    return MemoryStore(store.objects), flow


def test_drift_stops_the_run_and_shows_the_argument() -> None:
    store, flow = drifted(["Monday"])
    ended, _ = run_leg(store, flow)
    assert isinstance(ended.error, InputsDrifted)
    assert ended.error.changes == (("today", "Monday", "Tuesday"),) and ended.error.step == "stamp#0"
    assert (
        "--drift reuse" in str(ended.error) and "--drift rerun" in str(ended.error) and 'ignore=("today",)' in str(ended.error)
    )
    assert ran == ["Monday"]


def test_drift_reuse_takes_the_recorded_outcome() -> None:
    store, flow = drifted(["Monday"])
    assert run_leg(store, flow, on_drift="reuse")[0].value == "page as of Monday"
    assert ran == ["Monday"]


def test_drift_rerun_runs_the_call_and_retires_the_record_for_good() -> None:
    store, flow = drifted(["Monday"])
    store.crash_after = 1
    with pytest.raises(Crash):
        run_leg(store, flow, on_drift="rerun")
    assert run_leg(MemoryStore(store.objects), flow)[0].value == "page as of Tuesday"
    assert ran == ["Monday", "Tuesday"]


def test_an_ignored_argument_does_not_drift() -> None:
    store, flow = drifted(["Monday"], stamp.with_options(ignore=("today",)))
    assert run_leg(store, flow)[0].value == "page as of Monday"


def test_ignore_added_after_the_drift_resumes_without_running_again() -> None:
    today = ["Monday"]
    store, _ = drifted(today)
    mended = stamp.with_options(ignore="today")
    ended, _ = run_leg(store, lambda: last(mended("page", today[0])))
    assert ended.value == "page as of Monday" and ran == ["Monday"]


def test_a_step_that_does_not_exist_cannot_be_ignored() -> None:
    with pytest.raises(ValueError, match="no argument `todya`"):
        stamp.with_options(ignore="todya")


# --- values that cannot be stored ----------------------------------------------------------------------------------------


class Opaque:
    pass


def test_a_value_that_cannot_be_stored_says_so_and_stays_reachable() -> None:
    @checkpoint
    def make() -> Opaque:
        return Opaque()

    ended, _ = run_leg(MemoryStore(), lambda: make())
    assert isinstance(ended.error, NotDurableError)
    assert ended.error.step == "make" and isinstance(ended.error.value, Opaque) and "Opaque" in str(ended.error)


def test_pickle_needs_the_flows_consent() -> None:
    @checkpoint
    def make() -> Opaque:
        return Opaque()

    ended, _ = run_leg(MemoryStore(), lambda: type(make()).__name__, options=FlowOptions(allow_pickle=True))
    assert ended.value == "Opaque"


def test_a_large_outcome_is_a_blob_and_replays() -> None:
    @checkpoint
    def big() -> str:
        ran.append("big")
        return "x" * 400_000

    def flow() -> int:
        return len(last(big()))

    store = MemoryStore(crash_after=1)
    with pytest.raises(Crash):
        run_leg(store, flow)
    assert any("/blobs/" in name for name in store.objects)
    assert run_leg(MemoryStore(store.objects), flow)[0].value == 400_000 and ran == ["big"]


def test_a_name_that_cannot_be_stored_is_refused_when_it_is_given() -> None:
    for name in ("a/b", "", "x" * 101, "a#1", "a@b"):
        with pytest.raises(InvalidStepName):
            checkpoint(name=name)(lambda: None)


# --- at most once --------------------------------------------------------------------------------------------------------


def test_an_at_most_once_step_without_outcome_stops_the_resume() -> None:
    @checkpoint(at_most_once=True)
    def pay() -> str:
        ran.append("pay")
        return "paid"

    store = MemoryStore(crash_after=0)
    with pytest.raises(Crash):
        run_leg(store, lambda: pay())
    with pytest.raises(StepInDoubt, match="kitaru settle"):
        resume(MemoryStore(store.objects), lambda: pay())
    ended, _ = run_leg(MemoryStore(store.objects), lambda: pay())  # also a leg that was started past the resume
    assert isinstance(ended.error, StepInDoubt) and ran == ["pay"]


def test_a_step_in_doubt_that_did_not_take_effect_runs_once_it_is_settled() -> None:
    @checkpoint(at_most_once=True)
    def pay() -> str:
        ran.append("pay")
        return "paid"

    store = MemoryStore(crash_after=0)
    with pytest.raises(Crash):
        run_leg(store, lambda: pay())
    store = MemoryStore(store.objects)
    journal = Journal(store, "run")
    lease, snapshot = take_lease(journal, purpose="settle", takeover=True), journal.load()
    (marker,) = in_doubt(snapshot)
    reopened = (Reopened(path=marker.scope.path, generation=1),)
    journal.append(RetryEvent(nonce="n", run_id="run", epoch=lease.epoch, at=datetime.now(UTC), reopened=reopened))
    assert resume(store, lambda: pay()).value == "paid" and ran == ["pay", "pay"]
    store.objects = {name: data for name, data in store.objects.items() if "/steps/" not in name}
    ended, _ = run_leg(store, lambda: pay())  # the second start is in doubt like the first
    assert isinstance(ended.error, StepInDoubt)


def test_a_failed_at_most_once_step_is_not_tried_again_by_a_retry_around_it() -> None:
    @checkpoint(at_most_once=True)
    def pay() -> str:
        ran.append("pay")
        raise OSError("the line broke")

    @checkpoint(retries=2, retry_delay=0.001)
    def order() -> str:
        return pay()

    ended, _ = run_leg(MemoryStore(), lambda: order())
    assert isinstance(ended.error, OSError) and ran == ["pay"]


def test_at_most_once_excludes_retries() -> None:
    with pytest.raises(ValueError, match="at_most_once"):
        checkpoint(at_most_once=True, retries=1)(lambda: None)


# --- clock, randomness, ids ----------------------------------------------------------------------------------------------


def test_clock_randomness_and_ids_replay() -> None:
    seen = []

    def flow() -> Any:
        seen.append((now(), random(), uuid4(), now()))
        return last("x")

    store = MemoryStore(crash_after=4)
    with pytest.raises(Crash):
        run_leg(store, flow)
    run_leg(MemoryStore(store.objects), flow)
    assert seen[0] == seen[1] and seen[0][0] != seen[0][3]


def test_an_unwaited_submitted_step_that_fails_fails_the_flow() -> None:
    @checkpoint
    def broken() -> None:
        raise ValueError("unseen")

    def flow() -> str:
        broken.submit()
        return "fine"

    assert isinstance(run_leg(MemoryStore(), flow)[0].error, ValueError)


def test_steps_that_submit_and_wait_never_starve_the_steps_they_wait_for() -> None:
    @checkpoint
    def leaf(i: int) -> int:
        return i

    @checkpoint
    def branch(i: int) -> int:
        return sum(f.result() for f in leaf.map([i, i + 1]))

    def flow() -> list[int]:
        return [f.result() for f in branch.map(range(6))]

    ended, _ = run_leg(MemoryStore(), flow, options=FlowOptions(max_workers=2))
    assert ended.value == [1, 3, 5, 7, 9, 11]


def test_a_method_is_a_step() -> None:
    class Tool:
        @checkpoint
        def call(self, x: int) -> int:
            return x + 1

    assert run_leg(MemoryStore(), lambda: Tool().call(1))[0].value == 2
    assert Tool().call(1) == 2


def test_a_run_keeps_less_than_a_kilobyte_a_step() -> None:
    import tracemalloc

    class Sink(MemoryStore):
        """Keeps no steps, so that what is counted is the engine's."""

        def _commit(self, name: str, data: bytes) -> bytes | None:
            return None if "/steps/" in name else super()._commit(name, data)

        def create(self, name: str, data: bytes) -> bytes | None:
            return self._commit(name, data)

    @checkpoint
    def produce(i: int) -> dict[str, Any]:
        return {"i": i, "text": "x" * 5000}

    sizes: list[int] = []

    def flow() -> None:
        for i in range(3000):
            if i in (1000, 2999):
                sizes.append(tracemalloc.get_traced_memory()[0])
            produce(i)

    tracemalloc.start()
    try:
        assert run_leg(Sink(), flow)[0].error is None
    finally:
        tracemalloc.stop()
    assert (sizes[1] - sizes[0]) / 2000 < 1024
