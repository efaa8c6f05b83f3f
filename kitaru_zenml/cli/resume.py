"""`kitaru resume RUN`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import click

from kitaru_zenml.cli.output import Exit, cli_command, console, styled

if TYPE_CHECKING:
    from kitaru_zenml.journal.records import Lease


@cli_command("resume")
@click.argument("run")
@click.option("--takeover", is_flag=True, help="Supersede an executor that is alive.")
@click.option(
    "--drift", type=click.Choice(["reuse", "rerun"]), help="Inputs changed: take the recorded outcome, or run the call anew."
)
@click.option(
    "--retry", multiple=True, metavar="STEP", help="Also try this failed step again, though the flow caught its failure."
)
def command(run: str, takeover: bool, drift: Any, retry: tuple[str, ...], output: str) -> Any:
    """Continue RUN where it stopped, in the same ZenML run. Finished steps are not run again.

    JSON: {run, status, replayed, ran, vanished, code_changed}.
    """
    from kitaru_zenml.resumption import resume

    def waiting(lease: Lease, left: float) -> None:
        if output == "text":
            console.print(
                f"[dim]{lease.holder} may still hold the run; waiting {left:.0f} s for its lease to lapse (or --takeover)[/dim]"
            )

    handle = resume(run, takeover=takeover, on_drift=drift, retry=retry, on_wait=waiting)
    leg, status = handle.leg, handle.status
    view = {"run": handle.id, "status": status, **(dataclasses.asdict(leg) if leg else {})}
    if output == "text":
        console.print(f"Run {handle.id} is {styled(status)}.")
        if leg is not None:
            console.print(f"{leg.replayed} steps were replayed, {leg.ran} ran.")
            if leg.vanished:
                console.print(
                    f"[yellow]Finished steps that the code does not ask for any more:[/] {', '.join(leg.vanished[:10])}"
                )
            if leg.code_changed:
                console.print("[yellow]The flow's source file changed since the run began.[/]")
        console.print(f"Next: [bold]kitaru show {handle.id}[/bold]")
    return Exit(view, 0 if status in ("completed", "running", "paused") else 1)
