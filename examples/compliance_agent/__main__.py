"""Check packages from the command line."""

from __future__ import annotations

import argparse
from importlib.metadata import distributions

from examples.compliance_agent.agents import compliance
from examples.compliance_agent.scripted import NAME


def main() -> None:
    """Run the flow and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m examples.compliance_agent", description=__doc__)
    parser.add_argument("packages", nargs="*", help="installed packages; the first ten by default")
    parser.add_argument("--model", default=NAME, help="`scripted`, or a model as Pydantic AI names it (%(default)s)")
    asked = parser.parse_args()
    names = asked.packages or sorted({str(d.metadata["Name"]) for d in distributions() if d.metadata["Name"]})[:10]
    run = compliance.run(names, model=asked.model)
    if run.status != "completed":
        print(f"Run {run.id} is {run.status}. It asks: `kitaru waits {run.id}`, then `kitaru answer {run.id} WAIT true`.")
        return
    report = run.result()
    for entry in report.entries:
        print(f"{entry.state:8} {entry.package}: {entry.because}")
    print(report.summary)


if __name__ == "__main__":
    main()
