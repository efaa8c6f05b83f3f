"""Output functions and validators as steps: they run once, and what they consumed counts once."""

from __future__ import annotations

import copy
from collections.abc import Awaitable, Callable
from typing import Any

from pydantic import ValidationError
from pydantic_ai.exceptions import ModelRetry, ToolRetryError
from pydantic_ai.output import OutputContext
from pydantic_ai.tools import RunContext
from pydantic_ai.usage import RunUsage

from kitaru_zenml.adapters import Step, run_step
from kitaru_zenml_pydantic_ai.outcomes import Outcome, result_outcome, retry_outcome
from kitaru_zenml_pydantic_ai.steps import call_key, name_part


async def output_step(
    ctx: RunContext[Any], output_context: OutputContext, output: Any, handler: Callable[[Any], Awaitable[Any]]
) -> Any:
    """Process an output, or replay what came of it.

    Raises:
        ToolRetryError, ModelRetry: If the model must give it again.
    """
    name = f"output:{name_part(output_context.function_name)}" if output_context.function_name else "output"
    key = call_key(ctx) if output_context.tool_call is not None else None
    live: RunUsage | None = None

    async def processed() -> Any:
        nonlocal live
        before = copy.deepcopy(ctx.usage)
        try:
            result = await handler(output)
        except (ToolRetryError, ModelRetry) as error:
            live = ctx.usage - before
            return retry_outcome(error, live)
        except ValidationError as error:  # of a validator's own models: the model gets it to read
            live = ctx.usage - before
            return retry_outcome(ModelRetry(str(error)), live)
        live = ctx.usage - before
        return result_outcome(result, live)

    outcome = Outcome(await run_step(Step(name, {"output": output}, key, "output"), processed))
    if live is None and outcome.usage is not None:  # replayed: the body, which counts by itself, did not run
        ctx.usage.incr(outcome.usage)
    return outcome.get()
