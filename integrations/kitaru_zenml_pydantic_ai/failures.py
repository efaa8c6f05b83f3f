"""Errors of models as they are rebuilt from a record, so that fallbacks and hooks see on a replay what they saw live.

An HTTP error with a category (rate limit, server error, ...) has a private class that bears its category's name, so the name alone does not
find it again.
"""

from __future__ import annotations

from functools import partial

from pydantic_ai.durable_exec import JSON_CODEC
from pydantic_ai.durable_exec._utils import mark_streamed_before_failing, streamed_before_failing
from pydantic_ai.exceptions import ModelAPIError, ModelHTTPError
from pydantic_ai.messages import ModelResponse

from kitaru_zenml.adapters import Failure, decode_failure, register_failure, type_path


def register_model_errors() -> None:
    """Let the runtime rebuild the HTTP errors that have a category."""
    for http_class in _subclasses(ModelHTTPError):
        categories = [base for base in http_class.__bases__ if not issubclass(base, ModelHTTPError)]
        for category in categories:
            if issubclass(category, ModelAPIError) and type_path(category) == type_path(http_class):
                register_failure(category, partial(_rebuild, http_class=http_class, category=category))


def _rebuild(failure: Failure, *, http_class: type[ModelHTTPError], category: type[ModelAPIError]) -> BaseException:
    return decode_failure(failure, http_class if "status_code" in failure.state else category)


def keep_streamed(error: Exception) -> None:
    """Let what a stream had said before it broke be recorded with its failure."""
    if (partial := streamed_before_failing(error)) is not None:
        error.streamed = JSON_CODEC.dump(ModelResponse, partial)  # type: ignore[attr-defined]


def give_streamed(error: Exception) -> None:
    """Tell Pydantic AI again what the stream had said: its usage counts, and the request is not taken for one that never began."""
    if (partial := getattr(error, "streamed", None)) is not None:
        mark_streamed_before_failing(error, JSON_CODEC.load(ModelResponse, partial))


def _subclasses(cls: type[ModelHTTPError]) -> list[type[ModelHTTPError]]:
    direct = cls.__subclasses__()
    return [*direct, *(inner for one in direct for inner in _subclasses(one))]
