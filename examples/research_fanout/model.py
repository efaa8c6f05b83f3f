"""The model, at one seam: `plan`, and `order` and `fetch` of its batch endpoint. It is a scripted one; no provider is asked.

It finds what it says in the texts that it is given, by rules. Batches are what providers answer for less money and in their own time;
this one takes `RESEARCH_FANOUT_BATCH_SECONDS`, 5 by default. As models now and then do, it answers in prose where JSON was asked for:
always about `subprocess`, so that there is something to correct.
"""

from __future__ import annotations

import json
import os
import re

from pydantic import BaseModel

from examples.research_fanout.library import Entry, Passage

NAME = "scripted model (rules, no LLM)"
CHATTY = "subprocess"
_ABOUT = re.compile(r"\b(thread|(multi|sub)?process|coroutine|async|concurren|parallel|multi-consumer|task|executor)\w*", re.I)
_TOPICS, _POINTS = 5, 3


class Batch(BaseModel):
    """A request that the provider works on."""

    prompt: str
    seconds: float  # until it is done


def plan(question: str, entries: list[Entry]) -> list[str]:
    """Which modules to read to answer a question."""
    fits = [entry for entry in entries if _hits(f"{entry.module}: {entry.about}")]
    return sorted(
        entry.module for entry in sorted(fits, key=lambda entry: -_hits(f"{entry.module}: {entry.about[:200]}"))[:_TOPICS]
    )


def order(question: str, module: str, passages: list[Passage]) -> Batch:
    """Ask what a module has to say to a question."""
    texts = [passage.model_dump() for passage in passages]
    prompt = json.dumps({"question": question, "module": module, "texts": texts, "answer with": "JSON: summary, points"})
    return Batch(prompt=prompt, seconds=float(os.environ.get("RESEARCH_FANOUT_BATCH_SECONDS", "5")))


def fetch(batch: Batch) -> str:
    """The answer to a batch that is done."""
    asked = json.loads(batch.prompt)
    passages = [Passage(**text) for text in asked["texts"]]
    offers = [passage for passage in passages if not passage.text.startswith(("Raise", "Exception", "Base class"))]
    ranked = sorted(offers, key=lambda passage: -_hits(f"{passage.name} {passage.text}"))[:_POINTS]
    if asked["module"] == CHATTY:
        return f"Sure! The module offers {', '.join(passage.name for passage in ranked)}. Shall I go into detail?"
    points = [{"name": passage.name, "says": passage.text[:200], "source": passage.source} for passage in ranked]
    return json.dumps({"summary": f"{len(passages)} documented names; those that matter most here:", "points": points})


def _hits(text: str) -> int:
    return len(_ABOUT.findall(text))


def tokens(text: str) -> int:
    """As a provider would count them, roughly."""
    return len(text) // 4
