"""A plain list of the calls that really happened, beside the journal and without its help.

The demo and the tests compare it with the journal: a finished step that ran again would be in it twice. It stands for whatever a
tool does to the world. Without `LICENSE_AUDIT_CALLS` nothing is written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from kitaru_zenml import KitaruError, current_step

CALLS = "LICENSE_AUDIT_CALLS"  # environment variable: the file


@dataclass(frozen=True)
class CallMade:
    """A step's body that began to run."""

    step: str  # name of the step
    about: str
    path: str  # identity of the step in its run
    pid: int


def log_call(about: str) -> None:
    """Say that the current step's body runs. One `write` to a file opened for appending, so that lines never mix."""
    file = os.environ.get(CALLS)
    if not file:
        return
    try:
        step = current_step()
    except KitaruError:  # called outside a flow
        return
    line = json.dumps({"step": step.name, "about": about, "path": step.path, "pid": os.getpid()}) + "\n"
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


def calls_made(file: Path) -> list[CallMade]:
    """The calls of a file, in the order in which they began."""
    lines = file.read_text().splitlines() if file.exists() else []
    return [CallMade(**json.loads(line)) for line in lines]
