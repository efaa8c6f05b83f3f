"""`make demo-research`: a planner starts five runs, is killed while it does, suspends; one of the five fails and is corrected by a fork.

Everything is written to `.kitaru-demo/research`. The exit code is 1 if a topic was researched twice, or the report not written once.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from examples.research_fanout.library import read_module
from examples.research_fanout.model import CHATTY
from examples.stage import DemoFailed, Stage, command_line, newest_run, perform, read_json, status_of, title

TOPICS = 5


def show(stage: Stage) -> None:
    """Run, kill, let the worker go on, correct, and prove.

    Raises:
        DemoFailed: If a promise is broken.
    """
    report = stage.folder / "research.md"

    title("1. The planner starts a run for each topic, and is killed with SIGKILL after the second")
    planner = stage.start("python", "-m", "examples.research_fanout", "--report", str(report), log="planner.log")
    stage.until("two child runs", lambda: len(children()) >= 2, every=0.05)
    planner.kill()
    planner.wait()
    parent = newest_run("research")
    assert parent is not None
    print(f"kill -9 {planner.pid}: run {parent} has started {len(children())} of {TOPICS} child runs")

    title("2. Another process goes on: it starts the others, and ends when there is nothing left but batches to wait for")
    stage.run("kitaru", "resume", parent)
    stage.run("kitaru", "runs")

    title("3. A worker: each run goes on when its batch is done, the planner when all have ended")
    worker = stage.start("kitaru", "worker", log="worker.log")
    stage.until("the planner's failure", lambda: status_of(parent) == "failed")
    failed = next(run for run, status in children().items() if status == "failed")
    stage.run("kitaru", "failure", failed)

    title("4. A person corrects the one that failed: a fork, with what the model meant to say")
    correction = stage.folder / "finding.json"
    correction.write_text(json.dumps(corrected(), indent=1))
    stage.run("kitaru", "replay", failed, "--override", f"parse_answer=@{correction}", "--label", "the model answered in prose")
    stage.end(worker)

    title("5. The planner, resumed, takes the corrected result and writes the report")
    stage.run("kitaru", "resume", parent)
    stage.run("kitaru", "show", parent)
    print(report.read_text())
    prove(stage, parent, failed, report)


def corrected() -> dict[str, object]:
    """What a person makes of the model's chat: the same names, looked up."""
    wanted = ("Popen", "CompletedProcess", "TimeoutExpired")
    points = [{"name": p.name, "says": p.text, "source": p.source} for p in read_module(CHATTY) if p.name in wanted]
    return {"summary": "Corrected by hand:", "points": points}


def children() -> dict[str, str]:
    """The child runs that were started, and their status."""
    from zenml.client import Client

    return {str(run.id): run.status.value for run in Client().list_pipeline_runs(pipeline="research_topic", size=50).items}


def prove(stage: Stage, parent: str, failed: str, report: Path) -> None:
    """Compare what happened with what was promised.

    Raises:
        DemoFailed: If it is something else.
    """
    if status_of(parent) != "completed" or status_of(failed) != "failed":
        raise DemoFailed(f"the planner is {status_of(parent)}, the run that failed is {status_of(failed)}")
    count = Counter(children().values())
    if count != {"completed": TOPICS, "failed": 1}:
        raise DemoFailed(f"each topic has one run, and one has a fork: {count}")
    if report.read_text().count("\n## ") != TOPICS or "Corrected by hand" not in report.read_text():
        raise DemoFailed(f"the report is not whole: {report.read_text()}")
    verified = read_json(stage.run("kitaru", "verify", parent, "--output", "json", shows=False))
    if not verified["ok"]:
        raise DemoFailed(f"`kitaru verify` found something: {verified}")
    print(f"{TOPICS} topics, {TOPICS} child runs, 1 fork, 1 report: {report}. The run that failed stays as it was: {failed}.")


def main() -> None:
    """Parse the command line and show."""
    perform(command_line("research_fanout", __doc__, "research").parse_args().folder, show)


if __name__ == "__main__":
    main()
