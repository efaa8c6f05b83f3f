"""What a flow shows of itself while it runs: the model, the plain lines, and the tree on a real terminal."""

from __future__ import annotations

import io
import logging
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from kitaru_zenml import progress, screen
from kitaru_zenml.journal.records import Usage
from kitaru_zenml.progress import KEPT, RunProgress
from tests import flows_in_process as flows

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def run() -> RunProgress:
    return RunProgress("audit", "run-1", "plain")


def test_finished_siblings_beyond_a_few_are_counted_and_failures_stay(run: RunProgress) -> None:
    run.note("running", "fetch#0")
    run.note("failed", "fetch#0")
    for i in range(1, 500):
        run.note("running", f"fetch#{i}")
        run.note("finished", f"fetch#{i}")
    run.catch_up()
    assert len(run.root.done) == KEPT and run.root.done[0].state == "failed"
    assert run.root.folded == {("finished", "fetch"): 500 - KEPT} and not run.root.open
    assert run.facts() == "500 ran, 1 failed"


def test_what_a_finished_step_did_inside_is_forgotten_but_counted(run: RunProgress) -> None:
    run.note("running", "judge#0")
    run.note("running", "judge#0/model#0")
    run.note("finished", "judge#0/model#0", Usage(model="m", input_tokens=10, output_tokens=5, cost=0.5))
    run.note("finished", "judge#0")
    run.catch_up()
    (done,) = run.root.done
    assert (done.name, done.inside, done.tokens) == ("judge#0", 1, 15)
    assert run.facts() == "2 ran, 15 tokens, $0.5000"


def test_replayed_steps_cost_nothing_again(run: RunProgress) -> None:
    run.note("replayed", "model#0", Usage(model="m", input_tokens=10))
    run.catch_up()
    assert run.facts() == "0 ran, 1 replayed"


def test_noting_is_cheap(run: RunProgress) -> None:
    began = time.perf_counter()
    for _ in range(10_000):
        run.note("running", "fetch#0")
    assert time.perf_counter() - began < 0.2, "20 microseconds each, on the slowest machine"


def test_where_there_is_no_terminal_there_are_plain_lines(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("KITARU_PROGRESS")
    with caplog.at_level(logging.INFO, "kitaru_zenml"):
        handle = flows.doubling.run(3)
        with pytest.raises(ConnectionError):
            flows.failing.run()
    lines = [r.getMessage() for r in caplog.records if r.name == "kitaru_zenml"]
    assert any(re.fullmatch(rf"doubling finished in .*: 6 ran. Look at it with `kitaru show {handle.id}`.", x) for x in lines)
    assert "failing: step never#0 failed and is tried again" in lines and "failing: step never#0 failed" in lines
    assert any("ended after" in line and "with ConnectionError: 2 ran, 1 failed, 1 retry" in line for line in lines)
    assert len(lines) == 4, lines


def test_plain_lines_are_few(run: RunProgress, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [run.began]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with caplog.at_level(logging.INFO, "kitaru_zenml"):
        for i in range(1200):  # two minutes of a step each tenth of a second
            clock[0] += 0.1
            run.note("running", f"fetch#{i}")
            run.note("finished", f"fetch#{i}")
            run.speak(run.catch_up())
    assert 10 < len(caplog.records) < 20


@pytest.mark.parametrize(("told", "chosen"), [("0", "off"), ("plain", "plain"), ("tree", "tree"), ("", "plain")])
def test_the_environment_chooses(told: str, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITARU_PROGRESS", told)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert progress.mode() == chosen


def test_a_broken_screen_does_not_stop_a_run_and_threads_end_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KITARU_PROGRESS", "tree")

    def broken(*_: object) -> None:
        raise OSError("the terminal is gone")

    monkeypatch.setattr(screen.Screen, "draw", broken)
    monkeypatch.setattr(screen.Screen, "leave", broken)
    out, err = sys.stdout, sys.stderr
    assert flows.slow_steps.run(3, 0.2).result() == 3
    assert (sys.stdout, sys.stderr) == (out, err)
    deadline = time.monotonic() + 5
    while any(t.name == "kitaru-progress" for t in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Terminal(io.StringIO):
    """Stands for stdout and stderr."""

    encoding = "utf-8"

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        monkeypatch.setattr(sys, "stderr", self)
        monkeypatch.setattr(sys, "stdout", self)
        monkeypatch.setattr(screen.Screen, "_size", lambda _: (100, 12))

    def isatty(self) -> bool:
        return True


def test_a_tree_never_outgrows_the_terminal_and_shows_what_is_in_flight(
    run: RunProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    drawn = screen.Screen()
    for i in range(40):
        for step in (f"judge#{i}", f"judge#{i}/read#0", f"judge#{i}/model#0"):
            run.note("running", step)
        run.note("finished", f"judge#{i}/read#0")
        if i >= 6:
            run.note("finished", f"judge#{i}/model#0")
            run.note("finished", f"judge#{i}")
    run.catch_up()
    drawn.draw([run])
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", terminal.getvalue()).splitlines()
    drawn.close()
    assert len(lines) <= 10 and "audit" in lines[0]
    assert sum("judge#" in line and "/model#0" in line for line in lines) == 6 and any("34 finished" in line for line in lines)


def test_what_the_flow_prints_goes_above_the_tree_and_a_half_line_is_left_alone(
    run: RunProgress, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(monkeypatch)
    drawn = screen.Screen()
    run.note("running", "fetch#0")
    run.catch_up()
    drawn.draw([run])
    print("a line")
    assert terminal.getvalue().endswith("\x1b[2A\r\x1b[Ja line\n"), "two lines are lifted away first"
    print("half a li", end="")
    before = terminal.getvalue()
    drawn.draw([run])
    assert terminal.getvalue() == before
    print("ne")
    drawn.draw([run])
    assert "fetch#0" in terminal.getvalue()[len(before) :]
    drawn.close()
    assert sys.stdout is terminal and sys.stderr is terminal


def test_on_a_terminal_a_flow_shows_its_tree_and_leaves_stdout_to_itself(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "KITARU_PROGRESS"} | {"TERM": "xterm-256color"}
    with (tmp_path / "stdout").open("w") as stdout:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.cli.flows_for_cli", "napping", "30"], stdout=stdout, stderr=theirs, cwd=ROOT, env=env
        )
        os.close(theirs)
        seen = b""
        while True:
            try:
                more = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not more:
                break
            seen += more
    assert child.wait(60) == 0
    text = seen.decode()
    assert "\x1b[J" in text and "nap#0" in text, "it was drawn while it ran"
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rpartition("\x1b[J")[2])
    assert re.search(r"✓ nap\s+30 finished", last) and "✓ napping finished in" in last and "kitaru show " in last
    printed = (tmp_path / "stdout").read_text()
    assert "nap 29 is over" in printed and "\x1b[" not in printed.replace("\x1b[37m", "") and "ENDED completed" in printed
