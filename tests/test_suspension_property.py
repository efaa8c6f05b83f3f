"""Random flows that wait, killed at random writes and answered in random order: nothing lost, nothing twice, no answer swapped.

The real engine over a store in memory; what a real SIGKILL does is tested in `tests/crash`.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from kitaru_zenml import checkpoint, engine, event, execution, sleep, wait
from kitaru_zenml.errors import RunSuspended
from kitaru_zenml.journal.inbox import Inbox, put_answer, put_event
from kitaru_zenml.journal.journal import Journal, new_nonce
from kitaru_zenml.journal.records import Answer, SentEvent
from kitaru_zenml.options import FlowOptions
from tests.simulation import Crash, MemoryStore, run_leg

ran: Counter[str] = Counter()


@checkpoint
async def act(what: str) -> str:
    ran[what] += 1
    await asyncio.sleep(0)
    return f"did {what}"


@checkpoint
async def asks_inside(place: str) -> str:
    before = await act(f"{place} inside")
    answer = await wait("inner", schema=str, question=f"inner {place}")
    return f"{before} {answer}"


def program(seed: int) -> tuple[Any, int]:
    """A flow of parallel branches, and how many events it takes."""
    choose = random.Random(seed)
    branches = [
        [choose.choice(["act", "ask", "ask", "same", "inside", "nap"]) for _ in range(choose.randint(1, 4))] for _ in range(3)
    ]
    events = choose.randint(0, 3)

    async def branch(number: int, todo: list[str]) -> list[str]:
        got = []
        for place, what in enumerate(todo):
            if what == "act":
                got.append(await act(f"{number} {place}"))
            elif what == "ask":
                answer = await wait("ask", schema=str, question=f"{number} {place}")
                assert answer == f"to {number} {place}", (answer, number, place)
                got.append(await act(f"{number} {place} {answer}"))
            elif what == "same":  # equal questions: any answer will do, but each goes to one
                got.append("same " + await wait("same", schema=str, question="same"))
            elif what == "inside":
                got.append(await asks_inside(f"{number} {place}"))
            else:
                await sleep(0.001)
        return got

    async def flow() -> Any:
        results = await asyncio.gather(*(branch(i, todo) for i, todo in enumerate(branches)))
        orders = event("orders")
        return [results, [await orders.next() for _ in range(events)]]

    return flow, events


def answer_some(store: MemoryStore, choose: random.Random, events: int) -> None:
    """Answer one or more open waits, and send an event."""
    journal = Journal(store, "run")
    inbox = Inbox(journal)
    inbox.refresh()
    questions = [w for w in journal.open_waits() if w.kind == "wait" and inbox.answer(w.key) is None]
    for question in choose.sample(questions, choose.randint(0, len(questions))):
        text = f"unique {question.key}" if question.question == "same" else f"to {question.question}"
        answer = Answer(nonce=new_nonce(), run_id="run", wait=question.key, value=text, at=datetime.now(UTC))
        assert put_answer(journal, answer) == answer
        assert put_answer(journal, answer.model_copy(update={"nonce": new_nonce(), "value": "other"})) == answer
    sent = sum("/inbox/event-" in name for name in store.objects)
    if sent < events:
        for _ in range(2):  # the second is the same
            put_event(
                journal,
                SentEvent(
                    nonce=new_nonce(), run_id="run", name="orders", idempotency_key=f"e{sent}", payload=sent, sent_at=sent
                ),
            )


def play(seed: int, *, crashes: bool) -> tuple[Any, int, int]:
    """Run a program to its end; its result, and how many legs crashed and suspended."""
    flow, events = program(seed)
    choose, objects, crashed, suspended = random.Random(seed + 1), dict[str, bytes](), 0, 0
    while True:
        dies = crashes and choose.random() < 0.5
        store = MemoryStore(objects, crash_after=choose.randint(0, 6) if dies else None, seed=choose.random())
        recorded = {name for name in objects if "/steps/act-" in name}
        before = Counter(ran)
        try:
            ended, _ = run_leg(store, flow, options=FlowOptions(grace=0))
        except Crash:
            crashed += 1
        else:
            if ended.error is None:
                return ended.value, crashed, suspended
            assert isinstance(ended.error, RunSuspended), ended.error
            suspended += 1
        for what in ran - before:
            assert ran[what] - before[what] == 1, f"{what} ran twice in one leg"
        assert recorded <= set(objects)
        answer_some(MemoryStore(objects), choose, events)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    ran.clear()
    monkeypatch.setattr(engine, "QUIET", 0.05)
    monkeypatch.setattr(engine, "LOOK", 0.005)
    monkeypatch.setattr(execution, "WATCH_OPEN", 0.02)


@pytest.mark.timeout(600)
def test_random_flows_that_wait_lose_and_repeat_nothing() -> None:
    legs = Counter[str]()
    for seed in range(int(os.environ.get("KITARU_SEEDS", "30"))):
        ran.clear()
        result, crashed, suspended = play(seed, crashes=True)
        legs.update(crashed=crashed, suspended=suspended)
        flat = [text for branch in result[0] for text in branch if text.startswith("same ")]
        assert len(set(flat)) == len(flat), "an answer was given to two waits"
        assert result[1] == list(range(len(result[1]))), "events came out of order, twice or not at all"
        ran.clear()
        whole, _, _ = play(seed, crashes=False)
        assert all(times == 1 for times in ran.values()), "a finished step ran again"
        assert shape(whole) == shape(result)
    assert legs["crashed"] > 15 and legs["suspended"] > 30, legs


def shape(result: Any) -> Any:
    """A result without the answers to equal questions, which may be given to either."""
    return [[text if not text.startswith("same ") else "same" for text in branch] for branch in result[0]], result[1]


def test_an_event_whose_call_was_cancelled_before_it_was_stored_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = engine.Engine._encode

    def cancelled_once(self: Any, call: Any, value: Any, key: str) -> Any:
        if value == "tea" and not cancelled:
            cancelled.append(value)
            raise asyncio.CancelledError
        return encode(self, call, value, key)

    cancelled: list[Any] = []
    monkeypatch.setattr(engine.Engine, "_encode", cancelled_once)

    async def flow() -> Any:
        orders = event("orders")
        try:
            await asyncio.ensure_future(orders.next())
        except asyncio.CancelledError:
            pass
        return [await orders.next(), await orders.next()]

    objects: dict[str, bytes] = {}
    for number, payload in enumerate(("tea", "milk")):
        put_event(
            Journal(MemoryStore(objects), "run"),
            SentEvent(nonce=new_nonce(), run_id="run", name="orders", idempotency_key=payload, payload=payload, sent_at=number),
        )
    ended, _ = run_leg(MemoryStore(objects), flow, options=FlowOptions(grace=0))
    assert cancelled and ended.value == ["tea", "milk"], ended.error
