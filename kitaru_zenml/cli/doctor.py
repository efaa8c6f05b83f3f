"""`kitaru doctor`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kitaru_zenml.cli.output import Exit, cli_command, console
from kitaru_zenml.errors import KitaruError

SUPPORTED = ("0.98", "0.99")


@cli_command("doctor")
def command(output: str) -> Any:
    """Check what a durable run stands on: ZenML, its server, the stack, the artifact store. Exit code 1 if something is wrong.

    JSON: {checks: [{check, ok, found, remedy}], ok}.
    """
    checks: list[dict[str, Any]] = []

    def check(name: str, look: Callable[[], str], remedy: str) -> bool:
        try:
            found, ok = look(), True
        except Exception as error:
            found, ok = (str(error) if isinstance(error, KitaruError | _Wrong) else f"{type(error).__name__}: {error}"), False
        checks.append({"check": name, "ok": ok, "found": found, "remedy": "" if ok else remedy})
        return ok

    check("ZenML version", _version, "install a supported ZenML: pip install 'zenml>=0.98,<0.99'")
    if check("ZenML connection", _connection, "start or reach the server (`zenml status`), or `zenml login`"):
        check("stack", _stack, "choose a stack: `zenml stack list`, `zenml stack set NAME`")
        if check(
            "artifact store",
            _reachable,
            "check its path and credentials: `zenml artifact-store describe`; it must exist and be writable",
        ):
            check(
                "conditional writes",
                _conditional,
                "use a local artifact store, or an S3, GCS or Azure store that honours `If-None-Match: *`",
            )
    ok = all(entry["ok"] for entry in checks)
    if output == "text":
        for entry in checks:
            console.print(f"{'[green]✓[/]' if entry['ok'] else '[red]✗[/]'} [bold]{entry['check']}[/bold]: ", end="")
            console.print(entry["found"], markup=False)
            if entry["remedy"]:
                console.print(f"    → {entry['remedy']}", markup=False)
    return Exit({"checks": checks, "ok": ok}, 0 if ok else 1)


class _Wrong(Exception):
    """A check that failed, in words."""


def _version() -> str:
    import zenml

    low, high = SUPPORTED
    if not low <= ".".join(zenml.__version__.split(".")[:2]) < high:
        raise _Wrong(f"{zenml.__version__} is not between {low} and {high}")
    return str(zenml.__version__)


def _connection() -> str:
    from zenml.client import Client

    store = Client().zen_store
    return f"{store.type.value} at {store.url}, user {Client().active_user.name}"


def _stack() -> str:
    from zenml.client import Client

    from kitaru_zenml.leg import runs_in_process

    stack = Client().active_stack
    if not stack.orchestrator.supports_dynamic_pipelines:
        raise _Wrong(f"the orchestrator `{stack.orchestrator.name}` of stack `{stack.name}` cannot run dynamic pipelines")
    where = "runs in the calling process" if runs_in_process(stack) else "runs elsewhere"
    return f"{stack.name}: orchestrator `{stack.orchestrator.name}` ({stack.orchestrator.flavor}, {where})"


def _reachable() -> str:
    import secrets

    from zenml.client import Client

    from kitaru_zenml.artifact_store import open_store

    component = Client().active_stack.artifact_store
    store, name = open_store(component), f"kitaru/_probe/{secrets.token_hex(8)}"
    store.create(name, b"probe")
    store.delete([name])
    return f"{component.name} ({component.flavor}) at {store.uri}, writable"


def _conditional() -> str:
    from zenml.client import Client

    from kitaru_zenml.artifact_store import open_store, probe_conditional

    probe_conditional(open_store(Client().active_stack.artifact_store))
    return "an object is created only if it is absent"
