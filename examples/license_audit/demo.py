"""`make demo`: run the audit, kill it with SIGKILL in the middle, resume it from a new process, and prove what happened.

    make demo             a local artifact store and ZenML on SQLite, in .kitaru-demo/ and nowhere else
    make demo STACK=s3    a local S3 endpoint and a ZenML server over REST, started and stopped here

The proof does not rest on the journal: tools and model write each call they really make to a file of their own (`calls`), which is
compared with what the journal held when the process was dead. The exit code is 1 if a finished step ran again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples.license_audit.calls import CALLS, CallMade, calls_made
from examples.license_audit.model import chosen_model
from examples.license_audit.tools import list_distributions

ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 600.0  # seconds that each part may take: a ZenML server on a busy machine is slow


class DemoFailed(Exception):
    """The demo did not show what it promises."""


@dataclass(frozen=True)
class Proof:
    """What the journal and the list of real calls say together."""

    stored_at_kill: int
    stored_at_end: int
    first_calls: int  # tool and model calls of the killed process
    second_calls: int  # and of the one that resumed
    lost: int  # stored at the kill and gone at the end
    repeated: list[str]  # finished steps that were called again
    in_flight: list[str]  # begun and not finished at the kill: the only calls that may be made twice


# --- the parts of the demo -----------------------------------------------------------------------------------------------


def start(folder: Path, only: list[str] | None) -> subprocess.Popen[bytes]:
    """Start the audit in a child process."""
    command = [sys.executable, "-m", "examples.license_audit", "--report", str(folder / "report")]
    return _child([*command, *(["--only", *only] if only else [])], folder / "first.log", folder / "first.log")


def resume(folder: Path, run_id: str) -> subprocess.Popen[bytes]:
    """Continue the run in a new process, which knows nothing but its id: `kitaru resume RUN`."""
    kitaru = Path(sys.executable).with_name("kitaru")
    return _child([str(kitaru), "resume", run_id, "--output", "json"], folder / "second.json", folder / "second.log")


def _child(command: list[str], out: Path, err: Path) -> subprocess.Popen[bytes]:
    with contextlib.ExitStack() as files:
        stdout = files.enter_context(out.open("wb"))
        stderr = stdout if err == out else files.enter_context(err.open("wb"))
        return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)


def newest_run() -> str | None:
    """The id of the run that ZenML knows as the newest."""
    from zenml.client import Client

    runs = Client().list_pipeline_runs(sort_by="desc:created", size=1).items
    return str(runs[0].id) if runs else None


def wait_for_run(child: subprocess.Popen[bytes], log: Path, before: str | None) -> str:
    """The id of the run that the child began after run `before`."""
    until = time.monotonic() + PATIENCE
    while (run_id := newest_run()) in (None, before):
        _still_runs(child, log)
        if time.monotonic() > until:
            raise DemoFailed(f"no run began within {PATIENCE:.0f} s; see {log}")
        time.sleep(0.1)
    assert run_id is not None
    return run_id


def kill_in_the_middle(child: subprocess.Popen[bytes], log: Path, run_id: str, steps: int) -> dict[str, str]:
    """SIGKILL the child as soon as the journal holds so many steps; what it holds then, by step path."""
    from kitaru_zenml.artifact_store import open_store
    from kitaru_zenml.journal.records import run_folder
    from kitaru_zenml.runs import artifact_store_of, find_run

    store = open_store(artifact_store_of(find_run(run_id)))
    before = time.monotonic()
    while len(store.list(run_folder(run_id) + "steps/")) < steps:
        _still_runs(child, log)
        if time.monotonic() - before > PATIENCE:
            raise DemoFailed(f"the run did not come to {steps} steps within {PATIENCE:.0f} s; see {log}")
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return stored_steps(run_id)


def stored_steps(run_id: str) -> dict[str, str]:
    """What the journal holds: step path to step name."""
    from kitaru_zenml.runs import find_run, open_journal

    records = open_journal(find_run(run_id)).load().current()
    return {path: record.name for path, record in records.items() if path != "/"}


def _still_runs(child: subprocess.Popen[bytes], log: Path) -> None:
    if child.poll() is not None:
        raise DemoFailed(
            f"the audit ended before it could be killed (exit code {child.returncode}):\n{log.read_text()[-2000:]}"
        )


def prove(at_kill: dict[str, str], at_end: dict[str, str], calls: list[CallMade], killed: int) -> Proof:
    """Compare what was stored when the process was dead with the calls that were really made, before and after."""
    first, second = [c for c in calls if c.pid == killed], [c for c in calls if c.pid != killed]
    twice = {key for key, n in Counter((c.step, c.about) for c in calls).items() if n > 1}
    in_flight = [f"{c.step} {c.about}" for c in first if c.path not in at_kill]
    repeated = [f"{c.step} {c.about}" for c in second if c.path in at_kill]
    repeated += [f"{step} {about}" for step, about in twice if f"{step} {about}" not in in_flight]
    return Proof(
        len(at_kill),
        len(at_end),
        len(first),
        len(second),
        len(at_kill.keys() - at_end.keys()),
        sorted(set(repeated)),
        in_flight,
    )


# --- where it runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """A stack that is ready, and how a person looks at it."""

    what: str
    dashboard: str
    settings: dict[str, str]  # environment variables of whoever looks
    ends: bool = False  # with the demo: there is nothing to look at afterwards


@contextlib.contextmanager
def local_stack(folder: Path) -> Iterator[Place]:
    """ZenML's default stack, with everything in a folder of the project."""
    settings = {"ZENML_CONFIG_PATH": str(folder / "zenml")}
    with _environment(**settings):
        yield Place(
            what="ZenML on SQLite and a local artifact store",
            dashboard="zenml login --local",
            settings={"ZENML_CONFIG_PATH": _for_shell(folder / "zenml")},
        )


@contextlib.contextmanager
def s3_stack(folder: Path, keep: bool) -> Iterator[Place]:
    """A stack with an S3 artifact store and a ZenML server over REST, both on this machine and of this process."""
    from kitaru_zenml_stacks import loopback

    for left_over in ("server", "zenml"):
        shutil.rmtree(folder / left_over, ignore_errors=True)
    with loopback.moto_s3() as s3, loopback.zenml_server(folder / "server") as server:
        settings = server.client_env(folder / "zenml")
        with _environment(**settings):
            _activate_s3_stack(s3.artifact_store_config())
            yield Place(
                what=f"a ZenML server at {server.url} and S3 at {s3.endpoint}, started for this demo",
                dashboard=f"open {server.url}, user `default`, password `{server.password}`",
                settings={**settings, "ZENML_CONFIG_PATH": _for_shell(folder / "zenml")},
                ends=not keep,
            )


def _activate_s3_stack(configuration: dict[str, Any]) -> None:
    from zenml.client import Client
    from zenml.enums import StackComponentType

    client = Client()
    client.create_stack_component("s3", "s3", StackComponentType.ARTIFACT_STORE, configuration)
    client.create_stack("s3", {StackComponentType.ORCHESTRATOR: "default", StackComponentType.ARTIFACT_STORE: "s3"})
    client.activate_stack("s3")


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables, here and for the children. ZenML reads them when it is imported, which must come after."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# --- the show ------------------------------------------------------------------------------------------------------------


def show(folder: Path, place: Place, only: list[str] | None) -> None:
    """Run, kill, resume, prove, and say it on the way.

    Raises:
        DemoFailed: If a promise is broken.
    """
    from zenml.client import Client

    calls_file = folder / "calls.jsonl"
    calls_file.unlink(missing_ok=True)
    total = len(list_distributions(None, only))
    print(f"The agent audits the licences of {total} installed distributions.\nModel: {chosen_model()}\nStack: {place.what}")

    _title("1. Start")
    before = newest_run()  # on a first use this makes ZenML's database
    child = start(folder, only)
    try:
        run_id = wait_for_run(child, folder / "first.log", before)
        print(f"process {child.pid} executes run {run_id}")

        _title("2. Kill")
        at_kill = kill_in_the_middle(child, folder / "first.log", run_id, steps=max(2, int(total * 2.2)))
    finally:
        child.kill()
    print(f"kill -9 {child.pid}: the journal holds {len(at_kill)} finished steps\n  {_counted(at_kill)}")

    _title(f"3. Resume, in a new process: kitaru resume {run_id}")
    began = time.monotonic()
    second = resume(folder, run_id)
    try:
        follow(second, run_id, began)
    finally:
        second.kill()
    if second.returncode:
        raise DemoFailed(f"resume failed:\n{(folder / 'second.log').read_text()[-3000:]}")
    said = _answer(folder / "second.json")
    at_end = stored_steps(run_id)
    new = {path: name for path, name in at_end.items() if path not in at_kill}
    if not new:
        raise DemoFailed("the kill came too late, every step had finished: slow the model down with LICENSE_AUDIT_LATENCY=0.5")
    status = Client().get_pipeline_run(run_id).status.value
    in_zenml = Client().list_run_steps(pipeline_run_id=run_id, size=1).total
    print(f"process {second.pid}: {status} after {time.monotonic() - began:.0f} s")
    print(
        f"  from the journal: {len(at_kill)} steps, of which the code asked for {said['replayed']}; the others are inside those"
    )
    print(f"  run: {len(new)} steps\n    {_counted(new)}")
    print(f"  in ZenML: {in_zenml} step runs for {len(at_end)} steps")

    _title("4. Proof: the calls that tools and model noted themselves")
    proof = prove(at_kill, at_end, calls_made(calls_file), child.pid)
    print(f"calls of process {child.pid}: {proof.first_calls}, of process {second.pid}: {proof.second_calls}")
    print(f"  finished steps that ran again: {len(proof.repeated)}\n  finished steps lost: {proof.lost}")
    print(f"  in flight at the kill, so called again: {len(proof.in_flight)} ({', '.join(proof.in_flight) or 'none'})")
    if proof.repeated or proof.lost or status != "completed" or in_zenml != len(at_end):
        raise DemoFailed(f"a promise is broken: {proof}, {status}, {in_zenml} step runs in ZenML")

    _title("5. The report")
    print("\n".join((folder / "report" / "report.md").read_text().splitlines()[:16]))
    print(f"...\n{_short(folder / 'report' / 'report.md')}, {_short(folder / 'report' / 'report.json')}")

    _title("Where to look")
    if place.ends:
        print("The servers stop now; `make demo STACK=s3 ARGS=--keep` leaves them up, to look with the CLI and the dashboard.")
        return
    print("\n".join(f"export {name}={value}" for name, value in place.settings.items()))
    rows = [
        (f"kitaru show {run_id}", "the tree of steps"),
        (f"kitaru step {run_id} 'audit_package#0/classify#0'", "inputs, output, tokens"),
        (f"kitaru verify {run_id}", "every hash, and the journal against ZenML"),
        (place.dashboard, "the dashboard"),
    ]
    width = max(len(command) for command, _ in rows)
    print("\n".join(f"{command:<{width}}  # {what}" for command, what in rows))


def follow(process: subprocess.Popen[bytes], run_id: str, began: float) -> None:
    """Wait for the resuming process; on a terminal, say how far journal and ZenML are."""
    from zenml.client import Client

    while process.poll() is None:
        if time.monotonic() - began > PATIENCE:
            raise DemoFailed(f"resume did not end within {PATIENCE:.0f} s")
        if sys.stdout.isatty():
            in_zenml = Client().list_run_steps(pipeline_run_id=run_id, size=1).total
            print(f"\r  {time.monotonic() - began:.0f} s, {in_zenml} steps in ZenML ", end="", flush=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(1)
    if sys.stdout.isatty():
        print("\r" + " " * 60 + "\r", end="")


def _answer(file: Path) -> dict[str, Any]:
    text = file.read_text()
    try:
        answer: dict[str, Any] = json.loads(text)
    except ValueError:
        raise DemoFailed(f"`kitaru resume --output json` printed something else: {text[:2000]!r}") from None
    return answer


def _title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}", flush=True)


def _counted(steps: dict[str, str]) -> str:
    return ", ".join(f"{n} {name}" for name, n in Counter(steps.values()).most_common())


def _short(path: Path) -> str:
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _for_shell(path: Path) -> str:
    return f"$PWD/{path.relative_to(ROOT)}" if path.is_relative_to(ROOT) else str(path)


def main() -> None:
    """Parse the command line and show."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.license_audit.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stack", choices=("local", "s3"), default="local")
    parser.add_argument("--folder", type=Path, default=ROOT / ".kitaru-demo", help="everything is written there (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="audit only these distributions")
    parser.add_argument("--keep", action="store_true", help="with --stack s3: leave the servers up until Enter")
    options = parser.parse_args()
    folder = options.folder.resolve() / options.stack
    folder.mkdir(parents=True, exist_ok=True)
    stack = s3_stack(folder, options.keep) if options.stack == "s3" else local_stack(folder)
    quiet = {"ZENML_ANALYTICS_OPT_IN": "false", "ZENML_LOGGING_VERBOSITY": "ERROR", "AUTO_OPEN_DASHBOARD": "false"}
    try:
        with _environment(**quiet, **{CALLS: str(folder / "calls.jsonl")}), stack as place:
            show(folder, place, options.only)
            if options.stack == "s3" and options.keep:
                with contextlib.suppress(EOFError, KeyboardInterrupt):
                    input("\nThe servers are up until you press Enter.")
    except DemoFailed as failure:
        sys.exit(f"\nThe demo failed: {failure}")


if __name__ == "__main__":
    main()
