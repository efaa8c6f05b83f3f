"""The model, at one seam: `next_call`. It is a scripted one, which reads mails by rules; no provider is asked.

To put a real one here, send `conversation(...)` and the tools' names to it and return what it calls. The agent does not change.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel

from examples.refund_approval.shop import euros

NAME = "scripted model (rules, no LLM)"
_WANTS_MONEY = re.compile(r"\b(refund|money back)\b", re.I)
_ORDER = re.compile(r"\b(1\d{4})\b")


class ToolCall(BaseModel):
    """What the model wants next."""

    tool: Literal["look_up_order", "refund", "reply"]
    arguments: dict[str, Any]


class Turn(BaseModel):
    """A tool call, and what the tool gave."""

    call: ToolCall
    result: Any


def next_call(mail: str, turns: list[Turn]) -> ToolCall:
    """What to do next about a mail, after what was done so far."""
    results = {turn.call.tool: turn.result for turn in turns}
    number = _ORDER.search(mail)
    if number is None:
        return _reply("Thank you for your mail. Please send us the number of your order.")
    if "look_up_order" not in results:
        return ToolCall(tool="look_up_order", arguments={"number": number[1]})
    order = results["look_up_order"]
    if order is None:
        return _reply(f"We have no order {number[1]}. Please look at its number again.")
    if not _WANTS_MONEY.search(mail):
        return _reply(f"Your {order['item']} (order {order['number']}): {order['status']}.")
    if "refund" not in results:
        reason = " ".join(mail.split("\n\n", 1)[-1].split())[:160]
        return ToolCall(tool="refund", arguments={"order": order["number"], "cents": order["cents"], "reason": reason})
    refund = results["refund"]
    if refund["receipt"] is None:
        return _reply(f"We cannot refund order {order['number']}. {refund['note']}".strip())
    return _reply(f"We have refunded {euros(order['cents'])} for your {order['item']}; receipt {refund['receipt']}.")


def _reply(text: str) -> ToolCall:
    return ToolCall(tool="reply", arguments={"text": text})


def conversation(mail: str, turns: list[Turn]) -> str:
    """The prompt; its length is what the scripted model reports as tokens."""
    said = "\n".join(f"{turn.call.tool}({turn.call.arguments}) -> {turn.result}" for turn in turns)
    return f"You answer the mails of a shop. Call look_up_order, refund or reply.\n{mail}\n{said}"
