"""What the models say in the crash tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.openai_server import Answer, texts


def script(request: dict[str, Any]) -> Answer:
    """What the model says, told by the conversation alone."""
    if request["model"] == "down" and Path(os.environ["SERVER_DOWN"]).exists():
        return Answer(status=503)
    system, turn = "".join(texts(request, "system")), len(texts(request, "assistant"))
    if "reviewer" in system:
        if turn == 0:
            return Answer(tools=[("r1", "read_policy", {"topic": "refunds"})])
        return Answer(text="the reviewer agrees")
    if "clerk" in system:
        if turn == 0:
            return Answer(tools=[("c1", "book", {"amount": 5})])
        return Answer(text="booked: " + texts(request, "tool")[-1])
    if turn == 0:
        calls = [("call_1", "lookup", {"what": "order"}), ("call_2", "lookup", {"what": "customer"})]
        return Answer(tools=[*calls, ("call_3", "review", {"text": "please refund"})])
    if turn == 1:
        return Answer(tools=[("call_4", "refund", {"amount": 5}), ("call_5", "notify", {"whom": "bob"})])
    said = " ".join(sorted(t for t in texts(request, "tool") if "reviewer" in t or "denied" in t.lower()))
    return Answer(text=f"refund is done: {said}")
