"""What suspension and the worker cost: answer to next step, a worker that has nothing to do, ten thousand events through one run.

    python bench/suspend_resume.py                       all of it, to bench/results/suspend_resume.json
    python bench/suspend_resume.py --answers 5 --suspended 100 --events 1000

Everything runs against a ZenML of its own: a local artifact store and SQLite, on this machine. Suspended runs are made by writing what a
suspended leg leaves, in ZenML and in the journal, because running each would take an hour; half wait for an answer, half for a time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PATIENCE = 600.0


def until(what: Any, seconds: float = PATIENCE) -> Any:
    """Wait until something is true; its value."""
    deadline = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
    return value


def noted(what: str) -> float | None:
    """When a flow noted something."""
    for line in Path(os.environ["BENCH_NOTES"]).read_text().splitlines():
        if line.startswith(what + " "):
            return float(line.split()[1])
    return None


class Worker:
    """A worker as users start it, or one that counts its requests."""

    def __init__(self, *arguments: str, counted: bool = False) -> None:
        self.log = Path(tempfile.mktemp(prefix="bench-worker-", dir=os.environ["BENCH_FOLDER"]))
        command = [sys.executable, str(HERE / "suspend_resume.py"), "--worker"] if counted else [
            sys.executable, "-m", "kitaru_zenml.cli.main", "worker"
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([*command, *arguments], stdout=log, stderr=log, cwd=HERE)
        until(self._is_up)

    def _is_up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return "every unfinished run was looked at" in self.log.read_text()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def cpu_seconds(self) -> float:
        """Of the worker and its idle children."""
        import psutil

        root = psutil.Process(self.process.pid)
        times = [process.cpu_times() for process in (root, *root.children(recursive=True))]
        return float(sum(t.user + t.system for t in times))

    def memory_mb(self) -> float:
        """Of the worker and its idle children, shared pages counted once."""
        import psutil

        root = psutil.Process(self.process.pid)
        return float(sum(process.memory_full_info().pss for process in (root, *root.children(recursive=True)))) / 2**20


# --- answer to next step -------------------------------------------------------------------------------------------------


def answers(times: int) -> dict[str, Any]:
    """Seconds from the call that answers to the first step after it, one run at a time, with a warm worker."""
    import waiting_flows as flows

    from kitaru_zenml import client

    found, calls = [], []
    with Worker():
        for i in range(times + 1):
            run = flows.asking.run(f"run{i}").id
            time.sleep(2.5)  # the worker is idle, and has a warm process
            began = time.time()
            client.answer(run)
            calls.append(time.time() - began)
            found.append(until(lambda i=i: noted(f"run{i}-after")) - began)
    found, calls = found[1:], calls[1:]  # the first one warms this process
    return {
        "runs": times,
        "median_s": statistics.median(found),
        "worst_s": max(found),
        "best_s": min(found),
        "of_which_the_answer_itself_s": statistics.median(calls),
    }


# --- a worker with nothing to do -----------------------------------------------------------------------------------------


def suspend_many(count: int) -> float:
    """Make suspended runs; returns the seconds that it took."""
    import waiting_flows as flows

    began = time.monotonic()
    models = [
        (flow, _as_left(flow.run(*arguments).id)) for flow, *arguments in ((flows.asking, "model"), (flows.napping, 86400.0))
    ]
    for i in range(count - len(models)):
        flow, left = models[i % 2]
        _copy(flow, left)
    return time.monotonic() - began


def _as_left(run_id: str) -> dict[str, Any]:
    """What a suspended run's leg left in the journal, and its snapshot in ZenML."""
    from kitaru_zenml.journal.records import run_folder
    from kitaru_zenml.runs import find_run, open_journal

    run = find_run(run_id)
    store = open_journal(run).store
    names = store.list(run_folder(run_id))
    return {"run": run, "store": store, "objects": dict(zip(names, store.get_many(names), strict=True))}


def _copy(flow: Any, left: dict[str, Any]) -> None:
    """Another run that stands as that one does: its journal with every hash made anew, its ZenML run and its question."""
    from zenml.client import Client
    from zenml.enums import ExecutionStatus
    from zenml.models import PipelineRunUpdate
    from zenml.pipelines.run_utils import create_placeholder_run

    from kitaru_zenml.conditions import post_next
    from kitaru_zenml.journal.due import leave_hint
    from kitaru_zenml.journal.inbox import Inbox
    from kitaru_zenml.journal.journal import Journal

    model, store = left["run"], left["store"]
    run = create_placeholder_run(snapshot=model.snapshot, orchestrator_run_id=str(uuid4()))
    assert run is not None
    zenml, old, new = Client().zen_store, str(model.id), str(run.id)
    zenml.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.RUNNING))
    for name, data in left["objects"].items():
        (store.overwrite if name.endswith(".beat") else store.create)(name.replace(old, new), _renamed(data, old, new))
    journal = Journal(store, new)
    waits = journal.open_waits()
    if any(wait.kind == "wait" for wait in waits):
        post_next(run, journal, waits, Inbox(journal))
    else:
        leave_hint(store, new, datetime.now(UTC) + timedelta(days=1))
    zenml.update_run(run.id, PipelineRunUpdate(status=ExecutionStatus.PAUSED, status_reason="Waiting."))


def _renamed(data: bytes, old: str, new: str) -> bytes:
    import hashlib

    if not data.startswith(b'{"sha256":"'):
        return data.replace(old.encode(), new.encode())
    body = data[data.index(b'"body":') + 7 : -1].replace(old.encode(), new.encode())
    return b'{"sha256":"' + hashlib.sha256(body).hexdigest().encode() + b'","body":' + body + b"}"


def idle(count: int, seconds: float) -> dict[str, Any]:
    """Requests and processor time a minute of a worker while nothing is due."""
    made = suspend_many(count)
    counts = Path(os.environ["BENCH_FOLDER"]) / "counts.json"
    with Worker(str(counts), counted=True) as worker:
        log = worker.log.read_text()
        time.sleep(8)  # its spare is warm by then
        before, cpu, began = json.loads(counts.read_text()), worker.cpu_seconds(), time.monotonic()
        time.sleep(seconds)
        after, spent, passed = json.loads(counts.read_text()), worker.cpu_seconds() - cpu, time.monotonic() - began
        memory = worker.memory_mb()
    a_minute = {name: round((after[name] - before.get(name, 0)) * 60 / passed, 1) for name in after}
    return {
        "suspended_runs": count,
        "made_in_s": made,
        "first_sweep": next(line for line in log.splitlines() if "was looked at" in line).split(", ")[-1],
        "zenml_requests_a_minute": sum(v for n, v in a_minute.items() if n.startswith("zenml")),
        "store_requests_a_minute": sum(v for n, v in a_minute.items() if n.startswith("store")),
        "cpu_seconds_a_minute": spent * 60 / passed,
        "memory_mb": memory,
        "a_minute": a_minute,
    }


def counted_worker(counts: Path) -> None:
    """A worker with the default settings that writes down twice a second how many requests it has made."""
    import threading

    from kitaru_zenml.worker.children import Children
    from kitaru_zenml.worker.log import log_to_stderr
    from kitaru_zenml.worker.settings import Settings

    children = Children("text", {})
    children.keep_spare()
    from zenml.client import Client

    from kitaru_zenml.journal.local import LocalStore
    from kitaru_zenml.worker.worker import Worker as Loop

    zenml, seen = type(Client().zen_store), Counter[str]()
    for owner, what, names in (
        (LocalStore, "store", ("list", "get", "get_many", "create", "delete")),
        (zenml, "zenml", [name for name in dir(zenml) if name.startswith(("list_", "get_", "update_", "create_"))]),
    ):
        for name in names:
            _count_calls(owner, name, f"{what} {name}", seen)

    def write() -> None:
        while True:
            temporary = counts.with_suffix(".tmp")
            temporary.write_text(json.dumps(seen))
            temporary.rename(counts)
            time.sleep(0.5)

    threading.Thread(target=write, daemon=True).start()
    log_to_stderr("text")
    Loop(Settings(), children).run()


def _count_calls(owner: type, name: str, label: str, seen: Counter[str]) -> None:
    original = getattr(owner, name)
    if not callable(original):
        return

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen[label] += 1
        return original(*args, **kwargs)

    setattr(owner, name, counting)


# --- events --------------------------------------------------------------------------------------------------------------


def events(count: int) -> dict[str, Any]:
    """Many events through one run: sent from threads while the worker executes it."""
    import waiting_flows as flows

    from kitaru_zenml import client

    run = flows.counting.run(count)
    with Worker():
        began = time.time()
        with client.EventSender(run.id) as sender, ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: sender.send("orders", {"n": n}, idempotency_key=str(n)), range(count)))
        sent = time.time()
        client.send_event(run.id, "nothing")  # the sender has told the worker; one more hint does not hurt
        last = until(lambda: noted("last-event"), 3600)
        first = noted("first-event")
        assert first is not None
        until(lambda: run.status == "completed")
        ended = time.time()
    assert run.result() == sum(range(count))
    return {
        "events": count,
        "sent_in_s": sent - began,
        "sent_a_second": count / (sent - began),
        "first_taken_after_the_last_was_sent_s": first - sent,
        "taken_in_s": last - first,
        "taken_a_second": count / (last - first),
        "whole_s": ended - began,
    }


# --- all of it -----------------------------------------------------------------------------------------------------------


def show(results: dict[str, Any]) -> None:
    """A table of what was measured."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Suspend and resume", show_header=False)
    for what in ("answers", "idle", "events"):
        if found := results.get(what):
            table.add_section()
            for name, value in found.items():
                if not isinstance(value, dict):
                    table.add_row(what, name.replace("_", " "), f"{value:.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


def main() -> None:
    """Run the benchmark, or the worker of it."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    cli.add_argument("--answers", type=int, default=9)
    cli.add_argument("--suspended", type=int, default=1000)
    cli.add_argument("--idle-seconds", type=float, default=60)
    cli.add_argument("--events", type=int, default=10_000)
    cli.add_argument("--worker", type=Path)
    cli.add_argument("--out", type=Path, default=RESULTS / "suspend_resume.json")
    args = cli.parse_args()
    if args.worker:
        counted_worker(args.worker)
        return
    with tempfile.TemporaryDirectory(prefix="kitaru-bench-", dir=os.environ.get("BENCH_DIR")) as folder:
        path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ.update(
            ZENML_CONFIG_PATH=f"{folder}/zenml", ZENML_ANALYTICS_OPT_IN="false", ZENML_LOGGING_VERBOSITY="ERROR",
            AUTO_OPEN_DASHBOARD="false", KITARU_PROGRESS="0", BENCH_NOTES=f"{folder}/notes", BENCH_FOLDER=folder, PYTHONPATH=path,
        )  # fmt: skip
        Path(folder, "zenml").mkdir()
        Path(folder, "notes").touch()
        from zenml.client import Client

        Client().active_stack.artifact_store.path  # noqa: B018  (makes ZenML's database, once)
        results: dict[str, Any] = {
            "machine": {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()},
            "load_before": os.getloadavg()[0],
        }
        if args.answers:
            results["answers"] = answers(args.answers)
        if args.events:
            results["events"] = events(args.events)
        if args.suspended:
            results["idle"] = idle(args.suspended, args.idle_seconds)
        results["load_after"] = os.getloadavg()[0]
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    show(results)


if __name__ == "__main__":
    main()
