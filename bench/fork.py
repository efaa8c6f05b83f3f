"""How long a fork takes: from `replay` to the first new step, of a run of many steps on a local store; and what it writes.

    python bench/fork.py --steps 1000

The origin runs in a process of its own, and so does the fork, which therefore pays for a cold start of ZenML's client; that is measured
apart. Lineage follows behind the run: ZenML takes a request a step, so that the step runs of what is reused come in after the fork's own
work has begun, which is measured, too.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def origin(steps: int, size: int) -> dict[str, Any]:
    """The run to be forked."""
    import flows

    return {"run": flows.sequential.run(steps, size).id}


def fork(run: str) -> dict[str, Any]:
    """Fork it at its last step, in this process."""
    import flows

    from kitaru_zenml import leg
    from kitaru_zenml.runs import find_run, open_journal

    began = time.perf_counter()
    leg.warm_up()
    journal = open_journal(find_run(run))
    warm = time.perf_counter() - began
    last = max((r for r in journal.load().current().values() if r.path != "/"), key=lambda r: r.number)
    began = time.perf_counter()
    handle = flows.sequential.replay(run, from_=last.display)
    done = time.perf_counter() - began
    written = {
        folder: sum(len(journal.store.get(name)) for name in journal.store.list(f"{folder}/{handle.id}/"))
        for folder in ("kitaru", "kitaru/artifacts")
    }
    assert handle.leg is not None and handle.leg.ran == 1, handle.leg
    return {
        "cold_start_s": warm, "to_first_new_step_s": flows.STARTS[0] - began, "lineage_complete_s": done, "written_bytes": written,
        "replayed": handle.leg.replayed,
    }  # fmt: skip


def in_a_process(folder: Path, *arguments: str) -> dict[str, Any]:
    """What a measurement in a process of its own prints."""
    environment = {
        **os.environ, "ZENML_CONFIG_PATH": str(folder), "ZENML_ANALYTICS_OPT_IN": "false", "ZENML_LOGGING_VERBOSITY": "ERROR",
        "KITARU_PROGRESS": "0", "PYTHONPATH": f"{HERE.parent}:{HERE.parent / 'stacks'}:{HERE}",
    }  # fmt: skip
    command = [sys.executable, str(HERE / "fork.py"), *arguments]
    done = subprocess.run(command, env=environment, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=2000, help="bytes of each step's outcome")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.child:
        what, *rest = told.child
        print(json.dumps(origin(told.steps, told.size) if what == "origin" else fork(rest[0])))
        return
    with tempfile.TemporaryDirectory(prefix="kitaru-bench-") as folder:
        sizes = ["--steps", str(told.steps), "--size", str(told.size)]
        run = in_a_process(Path(folder), *sizes, "--child", "origin")["run"]
        result = {"steps": told.steps, "size": told.size, **in_a_process(Path(folder), *sizes, "--child", "fork", run)}
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
