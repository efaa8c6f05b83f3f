"""Runs a flow with an isolated step on a stack whose orchestrator can isolate, and prints what came of it; a process of its own."""

import json
from pathlib import Path

from zenml.client import Client
from zenml.enums import StackComponentType as Type
from zenml.utils import source_utils

from tests import flows_in_process as flows

source_utils.set_custom_source_root(str(Path(__file__).resolve().parents[1]))
client = Client()
client.create_flavor("tests.isolating.IsolatingOrchestratorFlavor", Type.ORCHESTRATOR)
orchestrator = client.create_stack_component("isolating", "isolating", Type.ORCHESTRATOR, configuration={})
store = client.active_stack_model.components[Type.ARTIFACT_STORE][0]
client.activate_stack(client.create_stack("isolating", {Type.ORCHESTRATOR: orchestrator.id, Type.ARTIFACT_STORE: store.id}).id)

handle = flows.with_heavy.run(2)
steps = client.list_run_steps(pipeline_run_id=handle.id, hydrate=True).items
from kitaru_zenml.lineage.compare import compare  # noqa: E402
from kitaru_zenml.runs import find_run, open_journal  # noqa: E402

records = open_journal(find_run(handle.id)).load().records
print(
    "RESULT "
    + json.dumps(
        {
            "result": handle.result(),
            "status": handle.status,
            "steps": sorted(s.name for s in steps),
            "differences": compare(records, steps),
            "pids": [r.outcome.data for r in records.values() if r.name == "heavy"],
        }
    )
)
