"""Where a durable call may be made from, and several flows in one process."""

from __future__ import annotations

import asyncio
import threading

import pytest

from kitaru_zenml import NotDurableError, current_step, resume
from kitaru_zenml.errors import EventLoopRunning, NotInRun, RunFinished
from tests import flows_in_process as flows


def test_outside_a_flow_a_checkpoint_is_a_plain_call() -> None:
    assert flows.double(2) == 4
    assert asyncio.run(flows.double_async(2)) == 4
    assert [f.result() for f in flows.double.map([1, 2])] == [2, 4]
    assert flows.double.submit(3).result() == 6
    with pytest.raises(NotInRun):
        current_step()


def test_a_flow_returns_a_handle_with_its_result() -> None:
    handle = flows.doubling.run(4)
    assert (handle.status, handle.result()) == ("completed", 24)
    assert handle.leg is not None and (handle.leg.ran, handle.leg.replayed) == (8, 0)
    with pytest.raises(RunFinished):
        flows.doubling.resume(handle.id)


def test_a_submitted_flow_runs_beside_the_caller() -> None:
    handle = flows.slow_steps.submit(2, 0.3)
    assert handle.status in ("initializing", "provisioning", "running")
    assert handle.result(timeout=60) == 2


def test_a_thread_without_the_runs_context_is_told_so() -> None:
    assert flows.lost_context.run().result() == ["bare NotInRun", "copied 4"]
    assert flows.lost_context_async.run().result() == ["NotInRun", "4"]


def test_a_blocking_run_inside_a_loop_names_the_way_that_works() -> None:
    async def main() -> int:
        with pytest.raises(EventLoopRunning, match="run_async"):
            flows.doubling.run(1)
        with pytest.raises(EventLoopRunning, match="resume_async"):
            flows.doubling.resume("x")
        return (await flows.doubling.run_async(1)).result()

    assert asyncio.run(main()) == 0


def test_eight_flows_run_at_once_in_threads() -> None:
    results: list[object] = []

    def run(n: int) -> None:
        try:
            results.append((n, flows.doubling.run(n).result()))
        except BaseException as error:
            results.append(repr(error))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == [str((n, 2 * n * (n - 1))) for n in range(8)]


def test_eight_flows_run_at_once_in_tasks() -> None:
    async def main() -> list[int]:
        return [h.result() for h in await asyncio.gather(*(flows.doubling_async.run_async(n) for n in range(8)))]

    assert asyncio.run(main()) == [n * (n - 1) for n in range(8)]


def test_flows_overlap_and_do_not_wait_for_one_another() -> None:
    import time

    async def main() -> float:
        began = time.monotonic()
        await asyncio.gather(*(flows.slow_steps.run_async(1, 4.0) for _ in range(4)))
        return time.monotonic() - began

    assert asyncio.run(main()) < 4 * 4


def test_a_failed_run_names_itself_and_the_way_on() -> None:
    with pytest.raises(ConnectionError, match="the model is down") as caught:
        flows.failing.run()
    assert any("kitaru resume" in note for note in caught.value.__notes__)


def test_the_public_names_are_what_they_say_whatever_was_imported_first() -> None:
    import kitaru_zenml
    import kitaru_zenml.checkpoints
    import kitaru_zenml.flows

    assert callable(kitaru_zenml.flow) and callable(kitaru_zenml.checkpoint) and callable(resume)
    assert issubclass(kitaru_zenml.StepInDoubt, kitaru_zenml.KitaruError) and NotDurableError is kitaru_zenml.NotDurableError
    with pytest.raises(AttributeError):
        kitaru_zenml.nothing


def test_options_given_at_the_call_reach_the_run() -> None:
    with_options = flows.doubling.with_options(lineage="sync", run_name="named-run-{date}-{time}")
    assert with_options.options.lineage == "sync" and flows.doubling.options.lineage == "async"
    handle = with_options.run(1)
    assert handle.run.name.startswith("named-run-") and handle.run.config.extra["kitaru"]["lineage"] == "sync"
    assert flows.registered_in_time.with_options(lineage="sync").run(2).result() == [0, 1]
