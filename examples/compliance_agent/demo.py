"""`make demo-compliance`: an agent is killed with SIGKILL, resumed, asks people, is answered, and is corrected by a fork.

Everything is written to `.kitaru-demo/compliance`. The proof is a file in which the scripted model and the tool note each call that they
really make. The exit code is 1 if a finished call was made again.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from examples.stage import DemoFailed, Stage, command_line, newest_run, perform, read_json, status_of, title

PACKAGES = ["zenml", "click", "rich", "pydantic", "openai", "numpy"]


def show(stage: Stage, packages: list[str]) -> None:
    """Run, kill, resume, answer, correct, and prove.

    Raises:
        DemoFailed: If a promise is broken.
    """
    calls = stage.folder / "calls"
    calls.touch()
    os.environ.update(COMPLIANCE_CALLS=str(calls), COMPLIANCE_LATENCY="0.5")

    title("1. An auditor reads packages in parallel, and is killed")
    process = stage.start("python", "-m", "examples.compliance_agent", *packages, log="first.log")
    stage.until("some calls", lambda: len(made(calls)) > len(packages) // 2 or None, every=0.05)
    run_id = newest_run("compliance")
    assert run_id is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    stood, before = finished(run_id), Counter(made(calls))
    print(
        f"kill -9 {process.pid}: {len(stood)} model and tool steps are in the journal, {sum(before.values())} calls were made"
    )

    title("2. Resumed, it goes on where it stopped, until it needs people")
    stage.run("kitaru", "resume", run_id)
    while status_of(run_id) == "paused":
        questions = read_json(stage.run("kitaru", "waits", run_id, "--output", "json", shows=False))
        stage.run("kitaru", "waits", run_id)
        for number, question in enumerate(questions):
            answer = '{"approve": false, "message": "not without its licence text"}' if number % 2 else "true"
            last = number == len(questions) - 1
            stage.run("kitaru", "answer", run_id, question["wait"], answer, "--by", "ann", *([] if last else ["--no-resume"]))
    stage.run("kitaru", "show", run_id)
    stage.run("kitaru", "verify", run_id)

    title("3. The proof")
    again = [what for what, times in Counter(made(calls)).items() if what.startswith("read ") and times > 1]
    repeated = [what for what in again if f"tool:read_package[{what.replace('read ', 'read_package-')}]" in " ".join(stood)]
    models = sum(what == "model" for what in made(calls))
    steps = [path for path in finished(run_id) if "/model@" in path]
    in_flight = models - len(steps)
    print(f"{models} model calls were made for {len(steps)} model steps; {in_flight} had no record yet at the kill")
    print(f"read twice, because it was cut off: {', '.join(again) or 'nothing'}; finished and read again: {len(repeated)}")
    if repeated or in_flight > 1 or not set(stood) <= set(finished(run_id)):
        raise DemoFailed(f"finished calls were made again: {repeated}, {in_flight}")

    title("4. A correction: what if the last answer of the auditor had been another one?")
    report = '{"entries": [], "summary": "signed off by the board"}'
    last_model = f"model#{sum('/reviewer' not in path for path in steps) - 1}"
    call = f'{{"tool_name": "final_result", "args": {report}}}'
    stage.run("kitaru", "replay", run_id, "--override", f"auditor#0/{last_model}={call}", "--label", "the board has decided")
    fork = newest_run("compliance")
    assert fork is not None
    stage.run("kitaru", "diff", run_id, fork)
    if sum(what == "model" for what in made(calls)) != models:
        raise DemoFailed("the fork asked the model again")
    print("No model call and no tool call was made for it.")


def made(calls: Path) -> list[str]:
    """The calls that were really made."""
    return calls.read_text().splitlines()


def finished(run_id: str) -> list[str]:
    """Paths of the model and tool steps that the journal holds."""
    from kitaru_zenml.runs import find_run, open_journal

    records: dict[str, Any] = dict(open_journal(find_run(run_id)).load().records)
    return sorted(r.path for r in records.values() if r.kind in ("model", "tool") and r.failure is None)


def main() -> None:
    """Parse the command line and show."""
    parser = command_line("compliance_agent", __doc__, "compliance")
    parser.add_argument("packages", nargs="*", default=PACKAGES, help="installed packages (%(default)s)")
    asked = parser.parse_args()
    perform(asked.folder, lambda stage: show(stage, asked.packages))


if __name__ == "__main__":
    main()
