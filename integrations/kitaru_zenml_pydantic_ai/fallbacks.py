"""A `FallbackModel` asks several models within one request: each of its attempts is a step inside the model step.

Without that, a crash between a failed attempt and the next one would ask the failed model again. A streamed attempt is no step of its own:
its events go to the handler while they come, and only the whole stream has an outcome.
"""

from __future__ import annotations

import copy
from typing import Any

from pydantic_ai.durable_exec import JSON_CODEC
from pydantic_ai.messages import ModelMessage, ModelResponse
from pydantic_ai.models import Model, ModelRequestParameters
from pydantic_ai.models.fallback import FallbackModel
from pydantic_ai.models.wrapper import WrapperModel
from pydantic_ai.settings import ModelSettings

from kitaru_zenml.adapters import Step, run_step
from kitaru_zenml_pydantic_ai.messages import compact_response, request_inputs, response_of
from kitaru_zenml_pydantic_ai.steps import name_part


class Attempt(WrapperModel):
    """One model of a fallback, whose requests are steps."""

    async def request(
        self,
        messages: list[ModelMessage],
        model_settings: ModelSettings | None,
        model_request_parameters: ModelRequestParameters,
    ) -> ModelResponse:
        """Replay or make the request; a failure is recorded too."""

        async def body() -> Any:
            response = await self.wrapped.request(messages, model_settings, model_request_parameters)
            return compact_response(JSON_CODEC.dump(ModelResponse, response))

        inputs = request_inputs(self.model_name, messages, model_settings, model_request_parameters)
        recorded = await run_step(Step(f"attempt:{name_part(self.model_name)}", inputs, kind="attempt"), body)
        response: ModelResponse = JSON_CODEC.load(ModelResponse, response_of(recorded))
        return response


class DurableFallback(FallbackModel):
    """A copy of a fallback model in which every attempt is a step."""


def with_attempts(model: Model) -> Model:
    """The model to use inside a model step."""
    if type(model) is not FallbackModel:
        return model
    durable = copy.copy(model)
    durable.__class__ = DurableFallback
    durable.models = [Attempt(inner) for inner in model.models]
    return durable
