"""Counters and gauges of one worker, in Prometheus' text format, and the little HTTP server that shows them.

Written by hand, because the format is a few lines and the worker needs nothing else of a client library.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kitaru_zenml.errors import InvalidWorkerSettings

# name -> (type, help)
METRICS = {
    "kitaru_worker_started_total": ("counter", "Runs that were started or continued."),
    "kitaru_worker_ended_total": ("counter", "Processes that ended, by how."),
    "kitaru_worker_given_up_total": ("counter", "Runs that were given up."),
    "kitaru_worker_looks_total": ("counter", "Runs that were looked at."),
    "kitaru_worker_problems_total": ("counter", "Looks, listings and queries that failed."),
    "kitaru_worker_answers_total": ("counter", "Answers that were taken over from ZenML."),
    "kitaru_worker_start_delay_seconds_sum": ("counter", "Seconds between a run's being found due and its start."),
    "kitaru_worker_running": ("gauge", "Runs that are being executed now."),
    "kitaru_worker_waiting": ("gauge", "Runs that are due and wait for a free process or a limit."),
    "kitaru_worker_limit_used": ("gauge", "Runs of a limit that are being executed now."),
    "kitaru_worker_limit_size": ("gauge", "Size of a limit."),
    "kitaru_worker_hints": ("gauge", "Hints in the watched stores, due or to come."),
    "kitaru_worker_warm": ("gauge", "Whether a process is warm and waits for the next run."),
    "kitaru_worker_draining": ("gauge", "Whether the worker takes no new runs."),
}


class Metrics:
    """The numbers of one worker. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}

    def add(self, name: str, by: float = 1.0, **labels: str) -> None:
        """Count."""
        with self._lock:
            series = self._values.setdefault(name, {})
            key = tuple(sorted(labels.items()))
            series[key] = series.get(key, 0.0) + by

    def set(self, name: str, to: float, **labels: str) -> None:
        """Set a gauge."""
        with self._lock:
            self._values.setdefault(name, {})[tuple(sorted(labels.items()))] = to

    def text(self) -> str:
        """All of them, in the text format."""
        lines = []
        with self._lock:
            for name, (kind, told) in METRICS.items():
                lines += [f"# HELP {name} {told}", f"# TYPE {name} {kind}"]
                series = self._values.get(name) or ({} if kind == "gauge" else {(): 0.0})
                for labels, value in sorted(series.items()):
                    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
                    lines.append(f"{name}{{{shown}}} {value:g}" if shown else f"{name} {value:g}")
        return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def serve(where: str, metrics: Metrics, health: Callable[[], tuple[bool, dict[str, Any]]]) -> ThreadingHTTPServer:
    """Serve `/healthz` and `/metrics` from a thread.

    Args:
        where: `host:port`, or a port of this machine alone; port 0 takes a free one.
        metrics: What `/metrics` shows.
        health: Whether the worker is well, and what `/healthz` says of it.

    Raises:
        InvalidWorkerSettings: If it cannot listen there.
    """

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4; charset=utf-8", metrics.text())
            elif self.path in ("/healthz", "/health"):
                well, facts = health()
                self._answer(200 if well else 503, "application/json", json.dumps(facts) + "\n")
            else:
                self._answer(404, "text/plain", "/healthz or /metrics\n")

        def _answer(self, code: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None:
            pass  # probes come every few seconds

    host, _, port = where.rpartition(":")
    try:
        server = ThreadingHTTPServer((host or "127.0.0.1", int(port)), Page)
    except (OSError, ValueError, OverflowError) as problem:
        raise InvalidWorkerSettings(f"`http` is host:port, and `{where}` cannot be listened on: {problem}") from None
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="kitaru-worker-http", daemon=True).start()
    return server
