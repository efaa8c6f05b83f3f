"""What the demos stand on: a folder with a ZenML of its own, processes that a person would start, and patience."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 240.0  # seconds that each part may take: a first use of ZenML on a busy machine is slow
_LIMIT = 60  # seconds in which a process that is asked to end does


class DemoFailed(Exception):
    """The demo did not show what it promises."""


class Stage:
    """An empty folder, in which everything happens. ZenML reads where it is when it is imported: make the stage before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "zenml").mkdir(parents=True)
        os.environ.update(
            ZENML_CONFIG_PATH=str(self.folder / "zenml"),
            ZENML_ANALYTICS_OPT_IN="false",
            ZENML_LOGGING_VERBOSITY="ERROR",
            AUTO_OPEN_DASHBOARD="false",
        )
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Stage:
        from zenml.client import Client

        print(f"ZenML on SQLite and a local artifact store, in {self.folder}", flush=True)
        assert (
            Client().active_stack_model
        )  # makes ZenML's database: two processes that make it at once get into each other's way
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._started:
            self.end(process)

    def start(self, *command: str, log: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start a process; what it says goes into a file."""
        print(f"$ {_as_typed(command)} &", flush=True)
        with (self.folder / log).open("ab") as file:
            process = subprocess.Popen(
                _found(command), cwd=ROOT, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, stdout=file, stderr=file
            )
        self._started.append(process)
        return process

    def run(self, *command: str, shows: bool = True, fails: bool = False, **settings: str) -> str:
        """Run a command to its end, and show it.

        Args:
            *command: As a person would type it.
            shows: Show also what it says.
            fails: Whether it is meant to.
            **settings: Environment variables.

        Raises:
            DemoFailed: If it fails, or does not though it is meant to.
        """
        print(f"$ {_as_typed(command)}", flush=True)
        done = subprocess.run(
            _found(command), cwd=ROOT, env={**os.environ, **settings}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=PATIENCE,
        )  # fmt: skip
        if (done.returncode != 0) is not fails:
            raise DemoFailed(
                f"`{_as_typed(command)}` ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        if shows:
            print(done.stdout, flush=True)
        return done.stdout

    def until(self, what: str, look: Callable[[], T | None], every: float = 0.5) -> T:
        """Look until there is something; what it is.

        Raises:
            DemoFailed: If it does not come.
        """
        give_up = time.monotonic() + PATIENCE
        while not (found := look()):
            if time.monotonic() > give_up:
                logs = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:]}" for log in self.folder.glob("*.log"))
                raise DemoFailed(f"waited {PATIENCE:.0f} s for {what}{logs}")
            time.sleep(every)
        return found

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Ask a process to end, and wait until it has."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(_LIMIT)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def title(text: str) -> None:
    """The head of a part."""
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def status_of(run_id: str) -> str:
    """The run's status in ZenML, now."""
    from kitaru_zenml import RunHandle

    return RunHandle[Any](run_id).status


def newest_run(flow: str) -> str | None:
    """The id of the flow's newest run, if it has one."""
    from zenml.client import Client

    runs = Client().list_pipeline_runs(pipeline=flow, sort_by="desc:created", size=1).items
    return str(runs[0].id) if runs else None


def read_json(text: str) -> Any:
    """What a command printed with `--output json`.

    Raises:
        DemoFailed: If it printed something else.
    """
    try:
        return json.loads(text)
    except ValueError:
        raise DemoFailed(f"this is not JSON: {text[:2000]!r}") from None


def _found(command: tuple[str, ...]) -> list[str]:
    """The command as this Python would run it."""
    programs: Mapping[str, list[str]] = {"python": [sys.executable], "kitaru": [sys.executable, "-m", "kitaru_zenml.cli.main"]}
    return [*programs[command[0]], *command[1:]]


def _as_typed(command: tuple[str, ...]) -> str:
    return shlex.join(command)


def command_line(demo: str, about: str | None, folder: str) -> argparse.ArgumentParser:
    """The options of a demo: where it happens."""
    parser = argparse.ArgumentParser(
        prog=f"python -m examples.{demo}.demo", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=ROOT / ".kitaru-demo" / folder, help="emptied first (%(default)s)")
    return parser


def perform(folder: Path, show: Callable[[Stage], None]) -> None:
    """Show a demo in a folder; ends the process with a sentence if it does not show what it promises."""
    try:
        with Stage(folder) as stage:
            show(stage)
    except DemoFailed as failure:
        sys.exit(f"\nThe demo failed: {failure}")
