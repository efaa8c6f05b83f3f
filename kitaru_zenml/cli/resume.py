"""`kitaru resume RUN`."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.text import Text

from kitaru_zenml.cli.output import Exit, cli_command, command_to_type, console, styled

if TYPE_CHECKING:
    from kitaru_zenml.journal.records import Lease

SAY_EVERY = 10  # seconds of waiting, where there is no terminal
NAMED = 10  # steps of a kind that are listed


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

    A dead executor's lease is waited for; progress goes to stderr.

    JSON: {run, status, replayed, ran, vanished, code_changed, new}: `vanished` are finished steps that the code does not ask for any
    more; `new`, if the code changed, are steps of a name that no earlier leg ran.
    """
    from kitaru_zenml.resumption import resume

    with _waiting() as waiting, lines_of_the_run():
        handle = resume(run, takeover=takeover, on_drift=drift, retry=retry, on_wait=waiting)
    leg, status = handle.leg, handle.status
    view: dict[str, Any] = {"run": handle.id, "status": status, **(dataclasses.asdict(leg) if leg else {}), "new": []}
    if leg is not None and leg.code_changed:
        view["new"] = _new_steps(handle.id)
    if output == "text":
        _print(view)
    return Exit(view, 0 if status in ("completed", "running", "paused") else 1)


def _print(view: dict[str, Any]) -> None:
    console.print(f"Run {view['run']} is {styled(view['status'])}.")
    if "ran" in view:
        console.print(f"{_steps(view['replayed'])} replayed, {view['ran']} ran.")
    if view.get("code_changed"):
        console.print("[yellow]The flow's source file changed since the run began.[/]")
    for what, names in (
        ("Finished steps that the code does not ask for any more", view.get("vanished", ())),
        ("Steps that no earlier leg ran", view["new"]),
    ):
        if names:
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            console.print(Text.assemble((f"{what}: ", "yellow"), ", ".join(names[:NAMED]), more))
    console.print(Text.assemble("Next: ", command_to_type(f"kitaru show {view['run']}")))


def _steps(count: int) -> str:
    return f"{count} step was" if count == 1 else f"{count} steps were"


def _new_steps(run_id: str) -> Sequence[str]:
    """Steps of the last leg whose name no earlier leg ran."""
    from kitaru_zenml.runs import find_run, open_journal

    records = open_journal(find_run(run_id)).load().records.values()
    last = max((r.epoch for r in records), default=0)
    known = {r.name for r in records if r.epoch < last}
    return sorted(r.display for r in records if r.epoch == last and r.name not in known and r.path != "/")


@contextlib.contextmanager
def _waiting() -> Iterator[Callable[[Lease, float], None]]:
    """Say that a lease is waited for: one line that counts down on a terminal, a line now and then elsewhere. To stderr."""
    stderr = Console(stderr=True, highlight=False)
    status, said = stderr.status(""), list[float]()

    def waiting(lease: Lease, left: float) -> None:
        text = (
            f"{lease.holder} may still hold the run (epoch {lease.epoch}); its lease lapses in {left:.0f} s unless it beats. "
        )
        text += "--takeover does not wait."
        if stderr.is_terminal:
            status.update(Text(text, style="dim"))
            status.start()
            if left <= 1:
                status.stop()
        elif not said or said[-1] - left >= SAY_EVERY:
            said.append(left)
            stderr.print(Text(text), soft_wrap=True)

    try:
        yield waiting
    finally:
        status.stop()


@contextlib.contextmanager
def lines_of_the_run() -> Iterator[None]:
    """Let progress lines and warnings of the run be seen, on stderr, though ZenML's own log is quiet."""
    logger, undo = logging.getLogger("kitaru_zenml"), contextlib.ExitStack()
    undo.callback(logger.setLevel, logger.level)
    logger.setLevel(logging.INFO)
    for handler in logging.root.handlers:  # ZenML's writes to stdout
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            undo.callback(handler.setStream, handler.stream)
            handler.setStream(sys.stderr)
    with undo:
        yield
