"""Workers and legs that are killed, asked to end, or doubled."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from kitaru_zenml import client
from kitaru_zenml.journal.records import DUE_FOLDER
from kitaru_zenml.journal.verify import verify
from tests.worker import flows
from tests.worker.harness import Worker, effect_lines, effects, epochs, journal, status, until


def test_two_workers_run_nothing_twice(tmp_path: Path, name: str) -> None:
    workers = [Worker(tmp_path, "--sweep", "2") for _ in range(2)]
    for worker in workers:
        worker.up()
    runs = [flows.slow.run(f"{name}.{i}", 3, 0.1).id for i in range(3)]
    for run in runs:
        client.answer(run)
    for run in runs:
        workers[0].until_status(run, "completed", seconds=60)
    assert [worker.stop() for worker in workers] == [0, 0]
    logs = "".join(worker.log for worker in workers)
    for i in range(3):
        assert effects(f"{name}.{i}") == ["step 0", "step 1", "step 2"], logs
    assert "crashed" not in logs and " failed " not in logs, logs
    assert all(verify(journal(run)).ok for run in runs)


def test_a_killed_worker_is_replaced_and_its_leg_goes_on(tmp_path: Path, name: str) -> None:
    first = Worker(tmp_path).up()
    run = flows.slow.run(name, 4, 1.0).id
    client.answer(run)
    first.until(lambda: effects(name))
    first.kill()
    second = Worker(tmp_path).up()
    second.until_status(run, "completed")
    assert effects(name) == [f"step {i}" for i in range(4)]
    assert len({pid for _, pid, _ in effect_lines(name)}) == 1, "the leg outlived its worker"
    assert second.stop() == 0
    assert f"run {run} continued" not in second.log


def test_a_worker_killed_with_its_leg_is_replaced(tmp_path: Path, name: str) -> None:
    first = Worker(tmp_path).up()
    run = flows.slow.run(name, 4, 0.5).id
    client.answer(run)
    first.until(lambda: len(effects(name)) >= 2)
    first.kill()
    os.kill(int(effect_lines(name)[-1][1]), signal.SIGKILL)
    second = Worker(tmp_path).up()
    second.until_status(run, "completed")
    done = effects(name)
    assert set(done) == {f"step {i}" for i in range(4)} and len(done) <= 5, "at most the step that was cut off ran again"
    assert second.stop() == 0


def test_a_leg_that_gets_sigterm_lets_go_and_is_continued(tmp_path: Path, name: str) -> None:
    worker = Worker(tmp_path).up()
    run = flows.slow.run(name, 6, 0.4).id
    client.answer(run)
    worker.until(lambda: len(effects(name)) >= 2)
    pid = int(effect_lines(name)[-1][1])
    began = time.monotonic()
    os.kill(pid, signal.SIGTERM)
    until(lambda: not alive(pid))
    assert time.monotonic() - began < 5
    worker.until_status(run, "completed")
    assert effects(name) == [f"step {i}" for i in range(6)], "the step in hand was finished and stored"
    assert worker.said(f"run {run} interrupted") and not worker.said("crashed")
    closes = [e.status for e in journal(run).load().events]
    assert closes == ["paused", "stopped", "completed"]
    assert verify(journal(run)).ok
    assert worker.stop() == 0


def test_a_leg_in_a_long_step_is_let_go_in_time(tmp_path: Path, name: str) -> None:
    worker = Worker(tmp_path, "--drain-timeout", "0.5").up()
    run = flows.slow.run(name, 2, 8.0).id
    client.answer(run)
    worker.until(lambda: effects(name))
    pid = int(effect_lines(name)[-1][1])
    began = time.monotonic()
    assert worker.stop() == 0, worker.log
    assert time.monotonic() - began < 7.9 and not alive(pid), "it waited for the step, which takes 8 s"
    assert status(run) == "running", "whoever continues it finds it as it was"
    store = journal(run).store
    assert [n for n in store.list(DUE_FOLDER) if n.endswith(run)]
    beat = journal(run).beat(2)
    assert beat is not None and beat.released
    client.request_cancel(run)
    second = Worker(tmp_path).up()
    second.until_status(run, "stopped")
    assert epochs(run) == 3 and second.stop() == 0


def test_draining_lets_legs_end_and_takes_no_new_work(tmp_path: Path, name: str) -> None:
    worker = Worker(tmp_path, "--http", "0").up()
    run = flows.slow.run(name, 3, 0.5).id
    other = flows.asking.run(f"{name}.other").id
    client.answer(run)
    worker.until(lambda: effects(name))
    worker.process.terminate()
    worker.until(lambda: worker.said("may go on for"))
    client.answer(other, "yes")
    assert worker.process.wait(30) == 0, worker.log
    assert status(run) == "completed" and status(other) == "paused"
    second = Worker(tmp_path).up()
    second.until_status(other, "completed")
    assert second.stop() == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
