"""The model behind the audit: a real one when a key is set, else the scripted one. Its name says which, everywhere.

The name is an argument of the flow: a resumed run goes on with the model it began with.

    OPENAI_API_KEY            takes an OpenAI-compatible provider
    OPENAI_BASE_URL           its address, https://api.openai.com/v1 by default
    OPENAI_MODEL              the model, gpt-4.1-mini by default
    LICENSE_AUDIT_PRICE       US dollars for a million tokens in and out, for example 0.40,1.60
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from examples.license_audit import scripted
from examples.license_audit.records import Classification, Conflict, Judgement, LicenceText, Metadata

A = TypeVar("A", bound=BaseModel)
TEXT_LIMIT, TEXTS_LIMIT = 6_000, 8  # characters of one text, and texts, that a prompt shows


class ModelUnavailable(Exception):
    """The provider did not answer, or answered something that is not what was asked for; worth another try."""


class ModelRefused(Exception):
    """The provider will not answer: a wrong key, an unknown model."""


@dataclass(frozen=True)
class Usage:
    """What a call consumed; `cost` in US dollars, if known."""

    model: str
    input_tokens: int
    output_tokens: int
    cost: float | None


class Model(Protocol):
    """What the audit asks of a model."""

    def classify(self, metadata: Metadata, texts: list[LicenceText]) -> tuple[Classification, Usage]:
        """Under which licence is this distribution?"""

    def judge(self, conflict: Conflict) -> tuple[Judgement, Usage]:
        """What should we do about this conflict?"""


def chosen_model() -> str:
    """The name of the model that this environment asks for."""
    if os.environ.get("OPENAI_API_KEY"):
        return f"openai:{os.environ.get('OPENAI_MODEL', 'gpt-4.1-mini')}"
    return scripted.NAME


def model_named(name: str) -> Model:
    """The model of that name."""
    return _Scripted() if name == scripted.NAME else _Provider(name.removeprefix("openai:"))


class _Scripted:
    def classify(self, metadata: Metadata, texts: list[LicenceText]) -> tuple[Classification, Usage]:
        return _counted(_classify_prompt(metadata, texts), scripted.classify(metadata, texts))

    def judge(self, conflict: Conflict) -> tuple[Judgement, Usage]:
        return _counted(_judge_prompt(conflict), scripted.judge(conflict))


def _counted(prompt: str, answer: A) -> tuple[A, Usage]:
    """Tokens as a provider would count them, roughly: four characters each."""
    return answer, Usage(scripted.NAME, len(prompt) // 4, len(answer.model_dump_json()) // 4, 0.0)


class _Provider:
    """Chat completions of an OpenAI-compatible provider."""

    def __init__(self, model: str) -> None:
        self._model = model

    def classify(self, metadata: Metadata, texts: list[LicenceText]) -> tuple[Classification, Usage]:
        return self._ask(_classify_prompt(metadata, texts), Classification)

    def judge(self, conflict: Conflict) -> tuple[Judgement, Usage]:
        return self._ask(_judge_prompt(conflict), Judgement)

    def _ask(self, prompt: str, answer: type[A]) -> tuple[A, Usage]:
        schema = json.dumps(answer.model_json_schema())
        reply = self._post(
            {
                "model": self._model,
                "response_format": {"type": "json_object"},
                "messages": [
                    {"role": "system", "content": f"You audit software licences. Answer with JSON of this schema: {schema}"},
                    {"role": "user", "content": prompt},
                ],
            }
        )
        try:
            value = answer.model_validate_json(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError, ValidationError) as error:
            raise ModelUnavailable(f"{self._model} did not answer with a {answer.__name__}: {error}") from error
        used = reply.get("usage") or {}
        tokens = int(used.get("prompt_tokens", 0)), int(used.get("completion_tokens", 0))
        return value, Usage(self._model, *tokens, _cost(*tokens))

    def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        key = os.environ.get("OPENAI_API_KEY")
        if not key:
            raise ModelRefused(f"This audit began with `{self._model}`: set OPENAI_API_KEY and resume it.")
        address = os.environ.get("OPENAI_BASE_URL", "https://api.openai.com/v1").rstrip("/") + "/chat/completions"
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=100) as response:
                reply: dict[str, Any] = json.load(response)
                return reply
        except urllib.error.HTTPError as error:
            said = error.read(500).decode(errors="replace")
            if error.code == 429 or error.code >= 500:
                raise ModelUnavailable(f"{address} answered {error.code}: {said}") from error
            raise ModelRefused(f"{address} answered {error.code}: {said}") from error
        except (OSError, ValueError) as error:
            raise ModelUnavailable(f"{address} did not answer: {error}") from error


def _cost(input_tokens: int, output_tokens: int) -> float | None:
    price = os.environ.get("LICENSE_AUDIT_PRICE")
    if not price:
        return None
    per_input, per_output = (float(part) for part in price.split(","))
    return (input_tokens * per_input + output_tokens * per_output) / 1_000_000


def _classify_prompt(metadata: Metadata, texts: list[LicenceText]) -> str:
    shown = "\n\n".join(f"--- {t.file}\n{t.text[:TEXT_LIMIT]}" for t in texts[:TEXTS_LIMIT]) or "It ships no licence text."
    return (
        f"Under which licence is the Python distribution {metadata.name} {metadata.version}? Give an SPDX expression "
        f"(NOASSERTION if nobody can tell); in `found`, each licence of each text by its file name.\n"
        f"Its metadata: {metadata.model_dump_json()}\n{shown}"
    )


def _judge_prompt(conflict: Conflict) -> str:
    return (
        "A distribution that we install and ship unchanged as a dependency is in conflict with our licence policy. Decide: accept it, "
        f"ask a person, or replace it; and say why in two sentences.\n{conflict.model_dump_json()}"
    )
