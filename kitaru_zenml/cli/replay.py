"""`kitaru replay RUN`."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from kitaru_zenml.cli.output import Exit, cli_command, command_to_type, console, given_value, styled, value_of_file
from kitaru_zenml.cli.resume import lines_of_the_run

_STEP = re.compile(r"((?:[^=\[]|\[[^\]]*\])+)=(.*)", re.S)  # a key may hold an equals sign: refund[a=b]


@cli_command("replay")
@click.argument("run")
@click.option("--from", "from_", metavar="STEP", help="Run from this step; what finished before it began is reused.")
@click.option(
    "--override",
    "overrides",
    multiple=True,
    metavar="STEP=VALUE",
    help="Take VALUE (JSON, else text; @file.json) as STEP's outcome.",
)
@click.option(
    "--input", "inputs", multiple=True, metavar="NAME=VALUE", help="Change an argument of the flow (JSON, else text; @file)."
)
@click.option(
    "--reuse", type=click.Choice(["before", "unchanged"]), default="before", show_default=True,
    help="Reuse what finished before the cut, or also later steps that are asked with the same inputs.",
)  # fmt: skip
@click.option("--label", metavar="TEXT", help="Why: shown with the fork and each overridden value.")
def command(
    run: str, from_: str | None, overrides: tuple[str, ...], inputs: tuple[str, ...], reuse: Any, label: str | None, output: str
) -> Any:
    """Fork RUN: a new run that reuses RUN's finished steps up to a cut and runs the rest. RUN itself stays as it is.

    The cut is where --from, else the first overridden step, began. STEP is the name shown by `kitaru show`, its end if that is
    unambiguous, or the path.

    JSON: {run, origin, status, replayed, ran, vanished, code_changed}: `vanished` are overridden steps that the flow did not ask for.
    """
    given = dict(_split(item, "--override", _STEP) for item in overrides)
    changed = dict(_split(item, "--input", re.compile(r"([^=]+)=(.*)", re.S)) for item in inputs)
    from kitaru_zenml.forks import replay
    from kitaru_zenml.runs import find_run

    origin = str(find_run(run).id)
    with lines_of_the_run():
        handle = replay(origin, from_=from_, overrides=given, inputs=changed, reuse=reuse, label=label)
    view = {
        "run": handle.id,
        "origin": origin,
        "status": handle.status,
        **(dataclasses.asdict(handle.leg) if handle.leg else {}),
    }
    if output == "text":
        _print(view)
    return Exit(view, 0 if view["status"] in ("completed", "running", "paused", "initializing", "provisioning") else 1)


def _split(item: str, option: str, pattern: re.Pattern[str]) -> tuple[str, Any]:
    found = pattern.fullmatch(item)
    if found is None:
        raise click.BadParameter(f"`{item}` has no `=`. Say NAME=VALUE.", param_hint=option)
    name, text = found.groups()
    if not text.startswith("@"):
        return name.strip(), given_value(text)
    path = Path(text[1:])
    if path.suffix == ".json":
        return name.strip(), value_of_file(path)
    try:
        return name.strip(), given_value(path.read_text())
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"`{path}` cannot be read: {error}", param_hint=option) from None


def _print(view: dict[str, Any]) -> None:
    console.print(f"Run {view['run']}, a replay of {view['origin']}, is {styled(view['status'])}.")
    if "ran" in view:
        console.print(f"{view['replayed']} of its steps were there already, {view['ran']} ran.")
    if view.get("code_changed"):
        console.print("[yellow]The flow's source file changed meanwhile.[/]")
    if view.get("vanished"):
        console.print(Text.assemble(("The flow did not ask for: ", "yellow"), ", ".join(view["vanished"])))
    console.print(Text.assemble("Next: ", command_to_type(f"kitaru diff {view['origin']} {view['run']}")))
