"""What a worker can be told, by command line or by a TOML file.

The file has the fields of `Settings` as keys, `limits` as a table:

    concurrency = 8
    stacks = ["production"]
    [limits]
    gpu = 1
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from kitaru_zenml.errors import InvalidWorkerSettings
from kitaru_zenml.identity import check_name


@dataclass(frozen=True)
class Settings:
    """How a worker works.

    Attributes:
        concurrency: Runs that it executes at once.
        limits: Sizes of the named limits of flows and steps.
        stacks: Names of the stacks whose artifact stores it watches; the active one by default.
        max_crashes: After so many crashes in a row without a finished step a run is given up.
        poll: Seconds between two looks for what is due; an object store is asked less often while nothing is.
        answers: Seconds between two looks for answers that were given in ZenML.
        sweep: Seconds from one sweep over all unfinished runs to the next, in case a hint was lost; it looks at one run a second.
        drain: Whether SIGTERM lets running legs end.
        drain_timeout: For how many seconds; then they are interrupted.
        http: `host:port` of health and metrics, or `None`.
        log_format: `text` or `json`.
    """

    concurrency: int = 4
    limits: dict[str, int] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()
    max_crashes: int = 5
    poll: float = 0.5
    answers: float = 2.0
    sweep: float = 600.0
    drain: bool = True
    drain_timeout: float = 30.0
    http: str | None = None
    log_format: str = "text"

    def __post_init__(self) -> None:
        for name in ("concurrency", "max_crashes"):
            if not isinstance(getattr(self, name), int):
                raise InvalidWorkerSettings(f"`{name}` is a whole number, not {getattr(self, name)!r}")
        for name in ("poll", "answers", "sweep", "drain_timeout"):
            if not isinstance(getattr(self, name), int | float):
                raise InvalidWorkerSettings(f"`{name}` is a number of seconds, not {getattr(self, name)!r}")
        if not all(isinstance(size, int) for size in self.limits.values()):
            raise InvalidWorkerSettings("`limits` gives each limit a whole number")
        if self.concurrency < 1 or self.max_crashes < 1 or any(size < 1 for size in self.limits.values()):
            raise InvalidWorkerSettings("`concurrency`, `max_crashes` and the sizes of limits are 1 or more")
        if min(self.poll, self.answers, self.sweep) <= 0 or self.drain_timeout < 0:
            raise InvalidWorkerSettings("`poll`, `answers` and `sweep` are more than 0 seconds")
        if self.log_format not in ("text", "json"):
            raise InvalidWorkerSettings(f"`log_format` is text or json, not `{self.log_format}`")
        for name in self.limits:
            check_name(name)  # it names files


def read_settings(file: Path | None, told: dict[str, Any]) -> Settings:
    """The settings of a file, and over them what the command line says.

    Args:
        file: A TOML file, or `None`.
        told: Those that were given; limits are added to those of the file.

    Raises:
        InvalidWorkerSettings: If the file cannot be read, or says what is not known.
    """
    found: dict[str, Any] = {}
    if file is not None:
        try:
            found = tomllib.loads(file.read_text())
        except (OSError, tomllib.TOMLDecodeError) as problem:
            raise InvalidWorkerSettings(f"`{file}` cannot be read: {problem}") from None
        unknown = sorted(set(found) - {f.name for f in fields(Settings)})
        if unknown:
            raise InvalidWorkerSettings(
                f"`{file}` sets `{unknown[0]}`, which is none of {', '.join(f.name for f in fields(Settings))}"
            )
        if "stacks" in found:
            found["stacks"] = tuple(found["stacks"])
    limits = {**found.pop("limits", {}), **told.pop("limits", {})}
    return replace(Settings(), **{**found, **told, "limits": limits})
