"""The worker's log: one line a decision, on stderr, as text for people or as JSON lines for machines."""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime

FACTS = ("run", "event", "why", "outcome", "seconds", "worker")  # what a line may carry besides its message


class TextLines(logging.Formatter):
    """`12:00:01 run 8a1d1c1e continued: approve#0 was answered`."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and a traceback below it if there is one."""
        at = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        text = f"{at} {_of_run(record)}{level}{record.getMessage()}"
        return text if record.exc_info is None else f"{text}\n{self.formatException(record.exc_info)}"


class JsonLines(logging.Formatter):
    """One JSON object a line, with the facts of the decision as fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: getattr(record, name) for name in FACTS if getattr(record, name, None) is not None}
        if "run" not in line and (run := os.environ.get("KITARU_RUN_ID")):
            line["run"] = run
        if record.exc_info is not None:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _of_run(record: logging.LogRecord) -> str:
    run = os.environ.get("KITARU_RUN_ID")
    return f"[{run[:8]}] " if run and run not in record.getMessage() else ""


def log_to_stderr(log_format: str) -> None:
    """Let lines of ours go to stderr as they are, past ZenML's log.

    Args:
        log_format: `text` or `json`.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if log_format == "json" else TextLines())
    ours = logging.getLogger("kitaru_zenml")
    ours.handlers, ours.propagate = [handler], False
    ours.setLevel(logging.INFO)
