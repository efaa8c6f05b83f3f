"""`python -m examples.refund_approval`: answer the mails; ends when everything is answered, or only questions to people are left."""

from __future__ import annotations

import argparse
from pathlib import Path

from zenml.utils import source_utils

from examples.refund_approval import model
from examples.refund_approval.flow import refund_approval
from examples.refund_approval.shop import Shop

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> None:
    """Parse the command line, run, and say what to do next."""
    parser = argparse.ArgumentParser(prog="python -m examples.refund_approval", description=__doc__)
    parser.add_argument("--mails", type=Path, default=HERE / "mails", help="folder of mails (%(default)s)")
    parser.add_argument("--orders", type=Path, default=HERE / "orders.csv", help="orders table (%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("refund-approval"), help="of ledger and outbox (%(default)s)")
    options = parser.parse_args()
    # ZenML would take this file's folder for the root of the sources, and then not find the flow from another process.
    source_utils.set_custom_source_root(str(ROOT))

    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    at = Shop(
        mails=str(options.mails.resolve()),
        orders=str(options.orders.resolve()),
        ledger=str(folder / "ledger.sqlite"),
        outbox=str(folder / "outbox"),
    )
    print(f"Model: {model.NAME}", flush=True)
    run = refund_approval.run(at)
    print(f"Run {run.id} is {run.status}.")
    if run.status == "paused":
        print(f"It waits for people, and this process ends. Next: kitaru waits {run.id}; kitaru worker")


if __name__ == "__main__":
    main()
