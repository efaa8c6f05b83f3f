"""`kitaru failure RUN`."""

from __future__ import annotations

from typing import Any

import click
from rich.panel import Panel
from rich.text import Text

from kitaru_zenml.cli.output import ago, cli_command, console, seconds
from kitaru_zenml.cli.step import _shown


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
        _print(report)
    return report.model_dump(mode="json")


def _print(report: Any) -> None:
    how = "raised" if report.ending == "raised" else "was found dead: its process is gone"
    console.print(f"[bold]{report.flow}[/bold] [red]{how}[/red]  run {report.run_id}, leg {report.epoch}, {ago(report.at)}")
    console.print(f"[dim]{', '.join(f'{n} {what.replace(chr(95), chr(32))}' for what, n in report.counts.items())}[/dim]")
    if report.failure is not None:
        text = report.failure.traceback.strip() or f"{report.failure.type}: {report.failure.message}"
        console.print(Panel(Text(text[-3000:]), title="exception", title_align="left", border_style="red"))
    if (step := report.failing_step) is not None:
        console.print(f"Failing step: [bold]{step.display.replace('[', chr(92) + '[')}[/bold], {step.attempts} attempt(s)")
        for name, tree in step.inputs.items():
            console.print(Panel(_shown(tree), title=f"input: {name}", title_align="left", border_style="dim"))
    for flight in report.in_flight:
        console.print(Text(f"○ {flight.display} was in flight since {flight.started_at:%H:%M:%S}"))
    for finished in report.last_finished[:5]:
        console.print(Text(f"✓ {finished.display} {seconds(finished.seconds)}", style="dim"))
    console.print("\nGo on from here:")
    for entry in report.commands:
        console.print(f"  [bold]{entry.command}[/bold]  [dim]{entry.want}[/dim]")
