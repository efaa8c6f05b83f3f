"""`kitaru`: the command group. Commands are imported when they are called, so that `kitaru --help` costs no ZenML import."""

from __future__ import annotations

import importlib
from typing import Any

import click

# name -> module, and what `kitaru --help` says of it
COMMANDS = {
    "runs": ("runs", "List the runs of kitaru flows."),
    "show": ("show", "Show the steps of a run as a tree, live with --watch."),
    "step": ("step", "Show one step: inputs, output, attempts."),
    "resume": ("resume", "Continue a run that was killed or failed; finished steps are not run again."),
    "waits": ("waits", "List the questions that runs wait for."),
    "answer": ("answer", "Answer a question of a run, and continue the run."),
    "send": ("send", "Send an event to a run."),
    "cancel": ("cancel", "Stop a run at its next boundary, and its child runs."),
    "replay": ("replay", "Fork a run: reuse its steps up to a cut, override outcomes or inputs, run the rest."),
    "diff": ("diff", "Compare two runs step by step: what was reused, changed, is new or gone."),
    "worker": ("worker", "Continue runs on their own: crashed, answered, due. Any number of workers."),
    "settle": ("settle", "Say what happened to an at-most-once step whose outcome is unknown."),
    "failure": ("failure", "Show why a run ended, and how to go on."),
    "delete": ("delete", "Delete a run: its journal, its artifacts and its ZenML run."),
    "verify": ("verify", "Recompute every hash of a run and compare its journal with ZenML."),
    "doctor": ("doctor", "Check ZenML, the stack and its artifact store."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"kitaru_zenml.cli.{COMMANDS[cmd_name][0]}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The table of commands, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="kitaru-zenml", prog_name="kitaru")
def main(**_: Any) -> None:
    """Durable runs of AI agents on ZenML: look at them, continue them, check them.

    RUN is a run's id, an unambiguous prefix of it, or its name. Every command takes --output json.
    """


if __name__ == "__main__":
    main()
