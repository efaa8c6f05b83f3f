"""Flows that the tests of forks run; each body notes that it ran."""

from __future__ import annotations

import asyncio
from typing import Any

from pydantic import BaseModel

from kitaru_zenml import checkpoint, current_step, flow
from kitaru_zenml.drivers import SyncCaller, drive
from kitaru_zenml.engine import Call
from kitaru_zenml.identity import HERE
from kitaru_zenml.inputs import digest_inputs
from kitaru_zenml.options import StepOptions

RAN: list[str] = []


class Verdict(BaseModel):
    kind: str
    score: float = 0.0


@checkpoint
def read(page: int) -> str:
    RAN.append(f"read {page}")
    return f"page {page} " + "text " * 40


@checkpoint
def judge(text: str) -> Verdict:
    RAN.append("judge")
    current_step().log_usage("model-x", input_tokens=10, output_tokens=5, cost=0.01)
    return Verdict(kind="refund", score=len(text) / 100)


@checkpoint
def act(verdict: Verdict) -> str:
    RAN.append(f"act {verdict.kind}")
    return f"did {verdict.kind}"


@checkpoint
def sign(name: str) -> str:
    RAN.append("sign")
    return f"signed by {name}"


@flow
def support(pages: int, name: str = "ann") -> str:
    texts = [read(n) for n in range(pages)]
    done = act(judge(" ".join(texts)))
    return f"{done}, {sign(name)}"


@checkpoint
def look(word: str) -> str:
    RAN.append(f"look {word}")
    return f"{word} found"


@checkpoint
def research(topic: str) -> str:
    RAN.append(f"research {topic}")
    return " and ".join([look(f"{topic} {n}") for n in range(2)])


@flow
def nested(topics: list[str]) -> list[str]:
    return [research(topic) for topic in topics]


@checkpoint
async def ask(question: str, seconds: float) -> str:
    RAN.append(f"ask {question}")
    await asyncio.sleep(seconds)
    return f"answer to {question}"


@checkpoint
def merge(answers: list[str]) -> str:
    RAN.append("merge")
    return "; ".join(answers)


@flow
async def together(questions: list[str]) -> str:
    answers = await asyncio.gather(*(ask(q, 0.05 * (len(questions) - n)) for n, q in enumerate(questions)))
    return merge(list(answers))


@flow(max_workers=4)
def mapped(words: list[str]) -> str:
    return merge([future.result() for future in look.map(words)])


@checkpoint
def broken(n: int) -> int:
    RAN.append("broken")
    raise ConnectionError("the model is down")


@flow
def breaking(n: int) -> int:
    read(n)
    return broken(n) + 1


def keyed(name: str, key: str, **arguments: Any) -> Any:
    """A keyed step, as an adapter makes it."""
    here = HERE.get()
    assert here is not None
    call = Call(name, digest_inputs(arguments), StepOptions(), key=key, kind="tool")

    def body() -> str:
        RAN.append(f"{name} {arguments}")
        return f"{name} done with {sorted(arguments.items())}"

    return drive(here.execution.engine.call(call, here, SyncCaller()), here.execution.store, name, body)


@flow
def with_tools(pages: int) -> str:
    verdict = judge(read(pages))
    return str(keyed("refund", "call_1", kind=verdict.kind)) + str(keyed("mail", "call_2", to="bob"))


@checkpoint
def large(n: int) -> str:
    RAN.append("large")
    return "x" * n


@checkpoint
def length(text: str) -> int:
    RAN.append("length")
    return len(text)


@flow
def with_large(n: int) -> int:
    return length(large(n)) + length("y")
