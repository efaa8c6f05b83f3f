"""`make demo-refunds`: three refunds wait for people, no process is left; answers come in another order, and a worker goes on.

Everything is written to `.kitaru-demo/refunds`. While it pays, the process that executes the run is killed with SIGKILL. The proof is
the payment service's own ledger. The exit code is 1 if a refund was made twice, or not at all.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from typing import Any

from examples.refund_approval import shop
from examples.stage import DemoFailed, Stage, command_line, newest_run, perform, read_json, status_of, title

EXPECTED = {"10388": 249_00, "10402": 319_00, "10423": 189_00, "10431": 14_90}  # what customers are owed, in cents


def show(stage: Stage) -> None:
    """Run, answer, kill, and prove.

    Raises:
        DemoFailed: If a promise is broken.
    """
    ledger = str(stage.folder / "ledger.sqlite")

    title("1. The agent answers five mails, and ends")
    stage.run("python", "-m", "examples.refund_approval", "--folder", str(stage.folder))
    run_id = newest_run("refund_approval")
    if run_id is None or status_of(run_id) != "paused":
        raise DemoFailed("the run did not pause")
    before = shop.requests_to(ledger)
    print(f"Paid back without asking: {', '.join(f'{shop.euros(r.cents)} for order {r.order}' for r in before)}.")

    title("2. What it waits for")
    stage.run("kitaru", "waits", run_id)

    title("3. A worker starts; the last question is answered first, on the command line")
    worker = stage.start("kitaru", "worker", log="worker.log", **{shop.SLOW: "3"})
    questions = read_json(stage.run("kitaru", "waits", run_id, "--output", "json", shows=False))
    last = questions[-1]
    stage.run("kitaru", "answer", run_id, last["wait"], '{"approve": true}', "--by", "ann", "--no-resume")

    title("4. kill -9, after the payment service has paid and before it replies")
    paying = stage.until("a payment", lambda: next(iter(shop.requests_to(ledger)[len(before) :]), None), every=0.05)
    os.kill(paying.process, signal.SIGKILL)
    print(f"kill -9 {paying.process}: order {paying.order} is paid, and the run does not know it")
    stage.until("the same request again", lambda: _requests(ledger)[paying.key] > 1)
    print("The worker noticed; the step ran again, under the same idempotency key.")

    title("5. The others are answered where ZenML shows them: in its dashboard, or through its API")
    for _ in questions[:-1]:
        answered = stage.until("a question in ZenML", lambda: answer_in_zenml(run_id))
        print(f"ZenML: {answered} -> approve")
    stage.until("the run's end", lambda: status_of(run_id) == "completed")
    stage.end(worker)

    title("6. The run, and the payment service's ledger")
    stage.run("kitaru", "show", run_id)
    stage.run("kitaru", "verify", run_id)
    refunds, requests = shop.refunds_in(ledger), shop.requests_to(ledger)
    for refund in refunds:
        print(f"order {refund.order}: {shop.euros(refund.cents)}, receipt {refund.receipt}")
    print(f"{len(requests)} requests, {len(refunds)} payments")
    if [(r.order, r.cents) for r in refunds] != sorted(EXPECTED.items()):
        raise DemoFailed(f"the ledger holds {refunds}")
    print(f"Each refund happened once. The replies are in {stage.folder / 'outbox'}.")


def answer_in_zenml(run_id: str) -> str | None:
    """Approve what ZenML shows of the run, as its dashboard does; the question, if it shows one."""
    from zenml.client import Client
    from zenml.enums import RunWaitConditionResolution

    shown = Client().list_run_wait_conditions(pipeline_run=run_id, status="pending", hydrate=True).items
    if not shown:
        return None
    result: dict[str, Any] = {"approve": True, "note": "seen in the dashboard"}
    Client().resolve_run_wait_condition(shown[0].id, resolution=RunWaitConditionResolution.CONTINUE, result=result)
    return shown[0].question


def _requests(ledger: str) -> Counter[str]:
    return Counter(request.key for request in shop.requests_to(ledger))


def main() -> None:
    """Parse the command line and show."""
    perform(command_line("refund_approval", __doc__, "refunds").parse_args().folder, show)


if __name__ == "__main__":
    main()
