"""Registers a stack on an S3 artifact store with the ZenML of the environment, or describes the default one; a process of its own."""

import json
import sys

from zenml.client import Client
from zenml.enums import StackComponentType as Type

client, config, name = Client(), json.loads(sys.argv[1]), sys.argv[2]
if config:
    store = client.create_stack_component(name, "s3", Type.ARTIFACT_STORE, configuration=config)
    orchestrator = client.active_stack_model.components[Type.ORCHESTRATOR][0]
    stack = client.create_stack(name, {Type.ARTIFACT_STORE: store.id, Type.ORCHESTRATOR: orchestrator.id})
else:
    stack = client.active_stack_model
print("STACK " + json.dumps({"id": str(stack.id), "local": "" if config else client.active_stack.artifact_store.path}))
