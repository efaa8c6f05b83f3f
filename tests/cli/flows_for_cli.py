"""Flows that the tests of the command line run in processes of their own, and kill."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from kitaru_zenml import checkpoint, current_step, flow
from kitaru_zenml.drivers import SyncCaller, drive
from kitaru_zenml.engine import Call
from kitaru_zenml.identity import HERE
from kitaru_zenml.inputs import digest_inputs
from kitaru_zenml.options import StepOptions


def die_if(told: str) -> None:
    if os.environ.get("DIE") == told:
        os.kill(os.getpid(), signal.SIGKILL)


@checkpoint
def read(n: int) -> str:
    return f"page {n}"


@checkpoint
def judge(n: int) -> str:
    text = read(n)
    die_if(f"judge {n}")
    current_step().log_usage("model-x", input_tokens=10, output_tokens=5)
    return text.upper()


@flow
def audit(n: int) -> list[str]:
    print("the flow prints this")
    return [judge(i) for i in range(n)]


@checkpoint(at_most_once=True)
def pay(amount: int) -> str:
    die_if("pay")
    return f"paid {amount}"


@flow
def paying(amount: int) -> str:
    read(0)
    return pay(amount)


@flow(lapse_seconds=2)
def short_lease(n: int) -> int:
    for i in range(n):
        read(i)
    die_if("end")
    return n


def keyed(name: str, key: str, **arguments: Any) -> Any:
    """A keyed step, as an adapter makes it."""
    here = HERE.get()
    assert here is not None
    call = Call(name, digest_inputs(arguments), StepOptions(), key=key, kind="tool")
    return drive(here.execution.engine.call(call, here, SyncCaller()), here.execution.store, name, lambda: refused(**arguments))


def refused(amount: int) -> str:
    raise ValueError(f"refund [{amount}] is refused")


@flow
def refunding(amount: int) -> None:
    read(amount)
    keyed("refund", "call_7", amount=amount)


@checkpoint
def nap(i: int) -> int:
    time.sleep(0.15)
    print(f"nap {i} is over")
    return i


@flow(max_workers=4)
def napping(n: int) -> int:
    return sum(f.result() for f in nap.map(range(n)))


if __name__ == "__main__":
    from zenml.utils import source_utils

    source_utils.set_custom_source_root(str(Path(__file__).resolve().parents[2]))
    from tests.cli import flows_for_cli

    handle = getattr(flows_for_cli, sys.argv[1]).run(int(sys.argv[2]))
    print("ENDED", handle.status)
