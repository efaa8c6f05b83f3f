"""`python -m examples.license_audit` (or `python examples/license_audit`): run the audit, or continue one that was killed."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def main() -> None:
    """Parse the command line, run, and say where the report is."""
    parser = argparse.ArgumentParser(prog="python -m examples.license_audit", description=main.__doc__)
    parser.add_argument("--report", default="license-audit-report", help="folder of the report (%(default)s)")
    parser.add_argument("--policy", default=str(HERE / "policy.toml"), help="policy file (%(default)s)")
    parser.add_argument("--environment", metavar="FOLDER", help="site-packages of another environment to audit")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="audit only these distributions")
    parser.add_argument("--resume", metavar="RUN", help="continue this run")
    options = parser.parse_args()

    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # for `python examples/license_audit`

    from zenml.utils import source_utils

    from examples.license_audit.flow import license_audit
    from examples.license_audit.model import chosen_model

    # ZenML would take this file's folder for the root of the sources, and then not find the flow from another process.
    source_utils.set_custom_source_root(str(ROOT))
    if options.resume:
        handle = license_audit.resume(options.resume)
    else:
        model = chosen_model()
        print(f"Auditing with {model}. Stop it whenever you like: `kitaru resume RUN` goes on.", flush=True)
        policy, report = Path(options.policy).resolve(), Path(options.report).resolve()
        handle = license_audit.run(model, str(policy), str(report), options.environment, options.only)
    files = handle.result()
    counts = ", ".join(f"{n} {verdict}" for verdict, n in files.verdicts.items())
    print(f"{files.distributions} distributions: {counts}. Model: {files.model}.\nReport: {files.markdown}\nRun: {handle.id}")


if __name__ == "__main__":
    main()
