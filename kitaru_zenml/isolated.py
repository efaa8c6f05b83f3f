"""Steps that run as native ZenML steps in a place of their own (`@checkpoint(isolated=True)`): a container, a step operator's machine.

The dynamic pipeline runner launches one ZenML step for all of them, `run_checkpoint`, which gets the checkpoint's import path and its
arguments. ZenML keeps the step run and its artifact; the journal records them like any other outcome. A leg that was killed while such
a step ran finds it again by its name and waits for it. Inside it durable calls are plain calls: the isolated step is the boundary.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from zenml import step
from zenml.client import Client
from zenml.config import ResourceSettings
from zenml.enums import StepRuntime
from zenml.execution.pipeline.dynamic.outputs import OutputArtifact
from zenml.execution.pipeline.dynamic.run_context import DynamicPipelineRunContext
from zenml.utils import source_utils

from kitaru_zenml.codec import Unencodable, from_tree, to_tree
from kitaru_zenml.errors import NotDurableError
from kitaru_zenml.identity import HERE
from kitaru_zenml.journal.records import display_path

if TYPE_CHECKING:
    from kitaru_zenml.checkpoints import Checkpoint

logger = logging.getLogger("kitaru_zenml")
_said: set[str] = set()


@step(enable_cache=False)
def run_checkpoint(function: str, arguments: dict[str, Any]) -> Any:
    """Call the function of a checkpoint.

    Args:
        function: Import path of the checkpoint.
        arguments: By name, as tagged JSON trees.

    Returns:
        The value as a tagged JSON tree, or itself if it has none and a ZenML materializer saves it.
    """
    from kitaru_zenml.checkpoints import Checkpoint

    found = source_utils.load(function)
    body = found.__wrapped__ if isinstance(found, Checkpoint) else found
    value = body(**{name: from_tree(tree) for name, tree in arguments.items()})
    try:
        return {"tree": to_tree(value)}
    except Unencodable:
        return value


def run_isolated(checkpoint: Checkpoint[Any, Any], arguments: dict[str, Any]) -> Any:
    """Run a checkpoint's body as a native step of the ZenML run, or here if the orchestrator cannot isolate, which is said once.

    Raises:
        NotDurableError: If an argument has no JSON form to travel in.
    """
    context, here, options = DynamicPipelineRunContext.get(), HERE.get(), checkpoint.options
    assert here is not None and here.step is not None
    if context is None or not (options.step_operator or context.runner.orchestrator.can_run_isolated_steps):
        if checkpoint.name not in _said:
            _said.add(checkpoint.name)
            logger.warning(
                "step `%s` is marked `isolated`, which this orchestrator cannot do: it runs in the process of the flow. Use a stack with "
                "a remote orchestrator, or give the step a `step_operator`.", checkpoint.name,
            )  # fmt: skip
        return checkpoint.__wrapped__(**arguments)
    try:
        trees = {name: to_tree(value) for name, value in arguments.items()}
    except Unencodable as error:
        raise NotDurableError(checkpoint.name, str(error), "an isolated step's arguments travel as JSON", error.leaf) from None
    settings = {"resources": options.resources or ResourceSettings()}
    native = run_checkpoint.with_options(
        runtime=StepRuntime.ISOLATED, settings=settings, step_operator=options.step_operator, parameters=None
    )
    name = display_path(here.scopes)
    if here.step.attempt > 1:  # ZenML answers a name with what it holds of it, failed or not
        name = f"{name}~{here.step.attempt}"
    source = source_utils.resolve(checkpoint.__wrapped__, skip_validation=True).import_path
    output = context.runner.launch_step(native, id=name, args=(), kwargs={"function": source, "arguments": trees})
    assert isinstance(output, OutputArtifact), "run_checkpoint has one output"
    found = Client().list_run_steps(pipeline_run_id=context.run.id, name=name, exclude_retried=True, size=1)
    here.step.step_run = str(found.items[0].id)
    value = output.load()
    return from_tree(value["tree"]) if isinstance(value, dict) and set(value) == {"tree"} else value
