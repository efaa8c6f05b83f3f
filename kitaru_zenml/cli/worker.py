"""`kitaru worker`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kitaru_zenml.cli.output import cli_command


@cli_command("worker")
@click.option("--concurrency", type=int, help="Runs executed at once. [4]")
@click.option("--limit", multiple=True, metavar="NAME=N", help="Size of a named limit of flows and steps.")
@click.option("--stack", multiple=True, metavar="NAME", help="Watch the artifact store of this stack. [the active one]")
@click.option("--max-crashes", type=int, help="Crashes in a row without a finished step after which a run is given up. [5]")
@click.option("--poll", type=float, metavar="SECONDS", help="Between two looks for what is due. [0.5]")
@click.option("--answers", type=float, metavar="SECONDS", help="Between two looks for answers given in ZenML. [2]")
@click.option("--sweep", type=float, metavar="SECONDS", help="From one sweep over unfinished runs to the next. [600]")
@click.option("--drain/--no-drain", default=None, help="On SIGTERM, let running legs end. [drain]")
@click.option("--drain-timeout", type=float, metavar="SECONDS", help="For so long; then they are interrupted. [30]")
@click.option("--http", metavar="[HOST:]PORT", help="Serve /healthz and /metrics there.")
@click.option("--log-format", type=click.Choice(["text", "json"]), help="Of the log, on stderr. [text]")
@click.option(
    "--config", type=click.Path(path_type=Path), help="A TOML file with these settings; what is given here counts more."
)
@click.option("--verbose", is_flag=True, help="Also say of which runs nothing is to be done, and why.")
def command(config: Path | None, verbose: bool, output: str, **told: Any) -> Any:
    """Continue runs whose process died, and suspended runs when their answer, time, event or child run is there.

    Any number of workers may run, on any machine that reaches ZenML and the artifact store; each run is executed once, under its lease.
    SIGTERM lets running legs end first; a second one interrupts them.

    JSON: {status}.
    """
    import logging

    from kitaru_zenml.worker.log import log_to_stderr
    from kitaru_zenml.worker.settings import read_settings

    given = {name: value for name, value in told.items() if value not in (None, ())}
    if "limit" in given:
        given["limits"] = dict(_limit(text) for text in given.pop("limit"))
    if "stack" in given:
        given["stacks"] = tuple(given.pop("stack"))
    settings = read_settings(config, given)
    from kitaru_zenml.worker.children import Children

    children = Children(settings.log_format, settings.limits)
    children.keep_spare()  # it gets warm while this process imports ZenML
    from kitaru_zenml.worker.worker import Worker

    log_to_stderr(settings.log_format)
    if verbose:
        logging.getLogger("kitaru_zenml.worker").setLevel(logging.DEBUG)
    return Worker(settings, children).run()


def _limit(text: str) -> tuple[str, int]:
    name, _, size = text.partition("=")
    try:
        return name, int(size)
    except ValueError:
        raise click.BadParameter(f"`{text}` is not NAME=N", param_hint="--limit") from None
