"""The agent: answer each mail; look orders up, pay back, reply. A refund above the limit waits for a person.

All mails are answered in parallel. When nothing is left but questions to people, the run suspends and its process ends; it holds
nothing while it waits. Any process continues it: the conversations are replayed from the journal, and each goes on with its answer.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from examples.refund_approval import model, shop
from examples.refund_approval.model import ToolCall, Turn
from examples.refund_approval.shop import Mail, Order, Shop, euros
from kitaru_zenml import checkpoint, current_step, flow, wait

LIMIT = 50_00  # cents that the agent may pay back without asking


class Decision(BaseModel):
    """A person's answer to: may we pay this back?"""

    approve: bool
    note: str = ""


# --- tools ---------------------------------------------------------------------------------------------------------------


@checkpoint
def read_mails(folder: str) -> list[Mail]:
    """The mails, as they are now: a resumed run answers those that it began with."""
    return shop.read_mails(folder)


@checkpoint
def look_up_order(table: str, number: str) -> Order | None:
    """The order of that number."""
    return shop.find_order(table, number)


@checkpoint(retries=3)
def pay_back(ledger: str, order: str, cents: int) -> str:
    """Pay a customer back. A crash may repeat the request, under the same key: the service pays once."""
    return shop.pay_back(ledger, order, cents, current_step().idempotency_key)


@checkpoint
def send_reply(outbox: str, name: str, to: str, text: str) -> str:
    """Answer the mail."""
    return shop.write_mail(outbox, name, to, text)


def refund(at: Shop, order: str, cents: int, reason: str) -> dict[str, Any]:
    """Pay back, after a person's approval if it is much."""
    if cents > LIMIT:
        asked = f"Refund {euros(cents)} for order {order}?"
        decision = wait("approve", schema=Decision, question=asked, metadata={"order": order, "customer says": reason})
        if not decision.approve:
            return {"receipt": None, "note": decision.note}
    return {"receipt": pay_back(at.ledger, order, cents), "note": ""}


# --- model and loop ------------------------------------------------------------------------------------------------------


@checkpoint(retries=3)
def ask_model(mail: str, turns: list[Turn]) -> ToolCall:
    """Which tool to call next."""
    call = model.next_call(mail, turns)
    current_step().log_usage(model.NAME, len(model.conversation(mail, turns)) // 4, len(call.model_dump_json()) // 4)
    return call


@checkpoint
def answer_mail(mail: Mail, at: Shop) -> str:
    """One mail: ask the model, do what it says, until it replies. Returns what was replied."""
    turns: list[Turn] = []
    while True:
        call = ask_model(mail.text, turns)
        match call.tool:
            case "look_up_order":
                order = look_up_order(at.orders, **call.arguments)
                result: Any = order and order.model_dump()
            case "refund":
                result = refund(at, **call.arguments)
            case "reply":
                sender = mail.text.splitlines()[0].removeprefix("From: ")
                send_reply(at.outbox, mail.name, sender, call.arguments["text"])
                return str(call.arguments["text"])
        turns.append(Turn(call=call, result=result))


@flow(grace=1)
def refund_approval(at: Shop) -> dict[str, str]:
    """Answer the shop's mails.

    Args:
        at: Where mails, orders, ledger and outbox are.

    Returns:
        The reply to each mail.
    """
    mails = read_mails(at.mails)
    replies = [reply.result() for reply in answer_mail.map(mails, at=at)]
    return dict(zip((mail.name for mail in mails), replies, strict=True))
