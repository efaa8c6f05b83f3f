"""The refund agent: what it does by itself, what it asks, and that each refund happens once though its process is killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from examples.refund_approval import demo, shop
from examples.refund_approval.flow import refund_approval
from examples.refund_approval.model import ToolCall, Turn, next_call
from examples.refund_approval.shop import Shop
from kitaru_zenml import client, resume

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "refund_approval"


@pytest.fixture
def at(tmp_path: Path) -> Shop:
    """The shop of the example, with a ledger of its own."""
    return Shop(
        mails=str(EXAMPLE / "mails"),
        orders=str(EXAMPLE / "orders.csv"),
        ledger=str(tmp_path / "ledger.sqlite"),
        outbox=str(tmp_path / "outbox"),
    )


def test_a_small_refund_needs_nobody_and_a_large_one_waits_for_a_person(at: Shop) -> None:
    run = refund_approval.run(at)

    assert run.status == "paused"
    assert [refund.order for refund in shop.refunds_in(at.ledger)] == ["10431"]
    assert sorted(path.stem for path in Path(at.outbox).iterdir()) == ["carla", "deniz"]
    questions = {q.metadata["order"]: q for q in client.waits(run.id)}
    assert questions.keys() == {"10388", "10402", "10423"}
    assert "crack" in questions["10423"].metadata["customer says"]

    client.answer(run.id, {"approve": False, "note": "Collect it first."}, wait=questions["10402"].wait)
    client.answer(run.id, {"approve": True}, wait=questions["10388"].wait)
    client.answer(run.id, {"approve": True}, wait=questions["10423"].wait)
    replies = resume(run.id).result()

    assert [refund.order for refund in shop.refunds_in(at.ledger)] == ["10388", "10423", "10431"]
    assert replies["eva"] == "We cannot refund order 10402. Collect it first."
    assert replies["anna"] == "We have refunded 189.00 EUR for your Espresso machine Prima; receipt R-10423."
    assert len(shop.requests_to(at.ledger)) == 3


@pytest.mark.parametrize(
    ("mail", "turns", "reply"),
    [
        ("I want a refund", [], "Please send us the number"),
        (
            "A refund for 19999",
            [Turn(call=ToolCall(tool="look_up_order", arguments={}), result=None)],
            "We have no order 19999",
        ),
    ],
)
def test_the_scripted_model_asks_back_about_an_order_that_it_does_not_know(mail: str, turns: list[Turn], reply: str) -> None:
    call = next_call(mail, turns)
    assert call.tool == "reply" and reply in call.arguments["text"]


def test_the_payment_service_pays_once_for_a_key(tmp_path: Path) -> None:
    ledger = str(tmp_path / "ledger.sqlite")
    receipts = {shop.pay_back(ledger, "10388", 100, "key") for _ in range(2)}
    assert receipts == {"R-10388"} and len(shop.requests_to(ledger)) == 2 and len(shop.refunds_in(ledger)) == 1


@pytest.mark.timeout(900)
def test_the_demo_answers_from_two_sides_kills_a_payment_and_refunds_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "examples.refund_approval.demo", "--folder", str(tmp_path / "demo")]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880, stdin=subprocess.DEVNULL)

    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "5 requests, 4 payments" in shown.stdout
    ledger = str(tmp_path / "demo" / "ledger.sqlite")
    assert {refund.order: refund.cents for refund in shop.refunds_in(ledger)} == demo.EXPECTED
    first, *others = (request.process for request in shop.requests_to(ledger))
    assert first not in others, "the process that asked was gone when the answers came"
