"""A process that has imported ZenML, our package and the flows once, and forks a leg for each order it reads from its standard input.

A leg is a real process with a ZenML client of its own; it dies by a real SIGKILL or leaves its answer in a file.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Read orders, a JSON object a line; answer each leg's exit, a JSON object a line."""
    import zenml.client
    import zenml.execution.pipeline.dynamic.runner
    import zenml.pipelines
    import zenml.zen_stores.sql_zen_store  # noqa: F401

    import kitaru_zenml.client
    import kitaru_zenml.flows
    import kitaru_zenml.resumption  # noqa: F401
    from tests.crash import flows  # noqa: F401

    for name in os.environ.get("ZYGOTE_IMPORTS", "").split():
        importlib.import_module(name)
    print(json.dumps({"ready": True}), flush=True)
    children: dict[int, str] = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "wait":
            status = os.waitpid(order["pid"], 0)[1]
            children.pop(order["pid"], None)
            print(json.dumps({"exit": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            leg(order)
        children[pid] = order["do"]
        print(json.dumps({"pid": pid}), flush=True)


def leg(order: dict[str, Any]) -> None:
    """What the forked process does. Never returns."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(order["env"])
    answer: dict[str, Any] = {}
    try:
        answer = perform(order)
    except BaseException as error:
        answer = {"error": type(error).__name__, "message": str(error)}
        traceback.print_exc()
    sys.stdout.flush()
    temporary = Path(order["answer"] + ".tmp")
    temporary.write_text(json.dumps(answer, default=str))
    temporary.rename(order["answer"])
    os._exit(0)


def perform(order: dict[str, Any]) -> dict[str, Any]:
    """Run or resume a flow, and look at what came of it."""
    from kitaru_zenml import client, resumption, runs
    from kitaru_zenml import leg as legs
    from tests.crash import flows
    from tests.crash.killing import KillingStore

    if order.get("at"):
        opened = legs.open_store
        killing: list[KillingStore] = []

        def open_store(component: Any) -> Any:
            if not killing:
                killing.append(
                    KillingStore(
                        opened(component), order["at"], order["when"], Path(order["ops"]), order.get("recorder", False)
                    )
                )
            return killing[0]

        runs.open_store = open_store  # type: ignore[assignment]
        legs.open_store = open_store  # type: ignore[assignment]
        resumption.open_store = open_store  # type: ignore[assignment]
    if order["do"] == "run":
        module, _, name = order["flow"].rpartition(":")
        handle: Any = getattr(importlib.import_module(module) if module else flows, name).run(**order.get("inputs", {}))
    elif order["do"] == "resume":
        handle = resumption.resume(order["run"], takeover=order.get("takeover", False))
    elif order["do"] == "settle":
        resumption.settle(order["run"], order["step"], value=order.get("value"), retry=order.get("retry", False))
        return {"settled": True}
    elif order["do"] == "answer":
        given = client.answer(order["run"], order["value"], wait=order["wait"], by=order.get("by"))
        return {"value": given.value, "by": given.by}
    elif order["do"] == "send":
        client.send_event(order["run"], order["event"], order["payload"], idempotency_key=order["key"])
        return {"sent": True}
    elif order["do"] == "cancel":
        return {"status": client.cancel(order["run"], order.get("reason", ""))}
    else:
        handle = runs.RunHandle(order["run"])
    return inspect(handle)


def inspect(handle: Any) -> dict[str, Any]:
    """The run's result, and whether journal and ZenML tell one story."""
    from zenml.client import Client
    from zenml.utils.pagination_utils import depaginate

    from kitaru_zenml.journal.verify import verify
    from kitaru_zenml.lineage.compare import compare
    from kitaru_zenml.runs import find_run, open_journal

    run = find_run(handle.id)
    journal = open_journal(run)
    noted: Any = run.run_metadata.get("kitaru") or {}
    steps = depaginate(Client().list_run_steps, pipeline_run_id=run.id, hydrate=True)
    records = journal.load().records
    return {
        "run": handle.id,
        "status": run.status.value,
        "result": handle.result() if run.status.value == "completed" else None,
        "leg": None if handle.leg is None else {"replayed": handle.leg.replayed, "ran": handle.leg.ran},
        "problems": verify(journal, noted.get("root")).problems,
        "differences": compare(records, steps),
        "steps": sorted(s.name for s in steps if s.status.value not in ("retried", "retrying")),
    }


if __name__ == "__main__":
    main()
