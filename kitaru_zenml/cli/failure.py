"""`kitaru failure RUN`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import ago, cli_command, command_to_type, console, seconds, section, traceback_of, value

if TYPE_CHECKING:
    from kitaru_zenml.lineage.failure import FailureReport

LAST = 5  # finished steps shown


@cli_command("failure")
@click.argument("run")
def command(run: str, output: str) -> Any:
    """Show why RUN ended: the exception, the failing step with its inputs, the steps in flight, and the commands that go on from here.

    For a run whose process is gone, this says where it was cut off. JSON: the failure artifact, see `lineage.failure.FailureReport`.
    """
    from kitaru_zenml.errors import KitaruError
    from kitaru_zenml.leg import failure_report, found_dead
    from kitaru_zenml.lineage.failure import load_failure
    from kitaru_zenml.runs import find_run, open_journal

    found = find_run(run)
    journal = open_journal(found)
    report = load_failure(journal.store, str(found.id))
    epoch = found_dead(found, journal)
    if epoch is not None and (report is None or report.epoch < epoch):
        report = failure_report(found, journal, epoch, "found dead")
    if report is None:
        raise KitaruError(f"Run {found.id} is {found.status.value} and has no failure. See it with `kitaru show {found.id}`.")
    if output == "text":
        _print(report, found.status.value)
    return report.model_dump(mode="json")


def _print(report: FailureReport, status: str) -> None:
    how = "ended with an exception" if report.ending == "raised" else "was found dead: its process is gone"
    console.print(Text.assemble((report.flow, "bold"), " ", (how, "red"), f"  {ago(report.at)}"))
    counts = ", ".join(f"{n} {what.replace('_', ' ')}" for what, n in report.counts.items() if n)
    console.print(Text(f"run {report.run_id}, leg {report.epoch}{f'; {counts}' if counts else ''}", style="dim"))
    if status == "completed":
        console.print(Text("A later leg went on from there: the run is completed now.", style="green"))
    step = report.failing_step
    if report.failure is not None:
        named = report.failure.type.rpartition(":")[2]
        console.print(Text.assemble((f"\n{named}: ", "bold red"), report.failure.message))
    if step is not None:
        console.print(Text.assemble("in step ", (step.display, "bold"), f", {step.attempts} attempt{'s'[: step.attempts - 1]}"))
        for name, tree in step.inputs.items():
            section(f"input {name}", value(tree))
    if (shown := step.failure if step is not None else report.failure) is not None:
        section("traceback", traceback_of(shown))
    for flight in report.in_flight:
        console.print(
            Text.assemble(("○ ", "yellow"), flight.display, (f"  in flight since {flight.started_at:%H:%M:%S}", "dim"))
        )
    if report.last_finished:
        console.print(Text("\nlast finished", style="dim"))
    for finished in report.last_finished[:LAST]:
        console.print(Text.assemble(("✓ ", "green"), finished.display, (f"  {seconds(finished.seconds)}", "dim")))
    console.print("\nGo on from here:")
    for entry in report.commands:
        console.print(Text.assemble("  ", command_to_type(entry.command), (f"   {entry.want}", "dim")))
