"""`python -m examples.research_fanout`: start the research; ends when it is done, or only the model's batches are waited for."""

from __future__ import annotations

import argparse
from pathlib import Path

from zenml.utils import source_utils

from examples.research_fanout import model
from examples.research_fanout.flow import research

ROOT = Path(__file__).resolve().parent.parent.parent
QUESTION = "How does Python's standard library let a program do several things at once?"


def main() -> None:
    """Parse the command line, run, and say what to do next."""
    parser = argparse.ArgumentParser(prog="python -m examples.research_fanout", description=__doc__)
    parser.add_argument("--question", default=QUESTION, help="(%(default)s)")
    parser.add_argument("--report", type=Path, default=Path("research.md"), help="file to write (%(default)s)")
    options = parser.parse_args()
    # ZenML would take this file's folder for the root of the sources, and then not find the flow from another process.
    source_utils.set_custom_source_root(str(ROOT))

    print(f"Model: {model.NAME}", flush=True)
    run = research.run(options.question, str(options.report.resolve()))
    print(f"Run {run.id} is {run.status}.")
    if run.status == "paused":
        print("It waits for its child runs, and they for the model's batches; this process ends. Next: kitaru worker")


if __name__ == "__main__":
    main()
