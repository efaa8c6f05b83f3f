"""What a durable step costs, beside the floor (one raw durable write) and beside a native ZenML step, in one run on one machine.

    make bench                                 all of it, to bench/results/step_overhead.json
    python bench/step_overhead.py --steps 100 --stack local

Each measurement runs in a process of its own, against a ZenML of its own: `local` is a local artifact store and SQLite, `s3` an S3
endpoint (moto's server) and a ZenML server over REST, all on this machine. A step's time is the gap between the starts of consecutive
step bodies, which do nothing but return their payload, so it holds the whole critical path: identify, encode, store, deliver.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import resource
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SIZES = {"2 KB": 2_000, "200 KB": 200_000}


# --- in the child: one measurement ---------------------------------------------------------------------------------------


def measure(what: str, steps: int, size: int) -> dict[str, Any]:
    """One measurement in this process."""
    if what == "floor":
        return floor(steps, size, threads=1)
    if what == "floor 16-way":
        return floor(steps, size, threads=16)
    if what.startswith("native"):
        return native(what, steps, size)
    if what == "chat":
        return chat(steps)
    if what == "resume":
        return resume_many(steps, size)
    return ours(what, steps, size)


def floor(steps: int, size: int, threads: int) -> dict[str, Any]:
    """The raw durable create of as many bytes as a record of this size has, nothing else."""
    from concurrent.futures import ThreadPoolExecutor

    from flows import payload
    from zenml.client import Client

    from kitaru_zenml.artifact_store import open_store

    store, gaps = open_store(Client().active_stack.artifact_store), []
    folder = f"kitaru/floor-{secrets.token_hex(4)}"

    def write(i: int) -> None:
        data = json.dumps(
            {"payload": payload(size, i), "record": secrets.token_hex(450)}
        ).encode()  # as compressible as the steps'
        began = time.perf_counter()
        assert store.create(f"{folder}/{i}.json", data) is None
        gaps.append(time.perf_counter() - began)

    write(-1)
    gaps.clear()
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(steps)))
    total = time.perf_counter() - began
    return {**spread(gaps), "steps_per_s": steps / total, "per_step_ms": 1000 * total / steps}


def ours(what: str, steps: int, size: int) -> dict[str, Any]:
    """Our steps: sequential or 16-way, lineage behind the run or with each step."""
    import flows

    flow = flows.concurrent if "16-way" in what else flows.sequential
    flow = flow.with_options(lineage="sync" if what.startswith("sync") else "async")
    flow.run(3, size)  # warm
    flows.STARTS.clear()
    before, cpu = objects(), time.process_time()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    flow.run(steps, size)
    ended = time.perf_counter()
    result = timing(flows.STARTS, steps, began, ended, cpu)
    after = objects()
    result |= {"objects": after[0] - before[0], "bytes": after[1] - before[1]}
    result["drain_s"] = ended - max(flows.STARTS)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    return result | {"memory_growth_kb_per_step": grown / steps}


def native(what: str, steps: int, size: int) -> dict[str, Any]:
    """The same work as native steps of a dynamic pipeline."""
    import flows

    pipeline = flows.native_concurrent if "16-way" in what else flows.native
    pipeline(steps=2, size=size)
    flows.STARTS.clear()
    cpu, began = time.process_time(), time.perf_counter()
    pipeline(steps=steps, size=size)
    return timing(flows.STARTS, steps, began, time.perf_counter(), cpu)


def chat(turns: int) -> dict[str, Any]:
    """Bytes that the journal of a growing chat stores, against the bytes of its messages."""
    import flows

    from kitaru_zenml.runs import open_journal

    handle = flows.chat.run(turns)
    messages = handle.result()
    store = open_journal(handle.run).store
    stored = sum(len(data or b"") for data in store.get_many(store.list(f"kitaru/{handle.id}/steps/")))
    return {"turns": turns, "message_bytes": messages, "journal_bytes": stored, "ratio": stored / messages}


def resume_many(steps: int, size: int) -> dict[str, Any]:
    """Resume of a killed run with many finished steps: from the call to the first new step, the client warm; and from a cold start."""
    run_id = os.environ["BENCH_RUN"]
    began_cold = float(os.environ["BENCH_BEGAN"])
    import flows
    from zenml.client import Client

    from kitaru_zenml import leg, resume

    leg.warm_up()  # the import and the first use are paid
    Client().list_pipeline_runs(size=1)
    began = time.perf_counter()
    resume(run_id)
    return {
        "finished_steps": steps - 1,
        "warm_to_first_new_step_s": flows.STARTS[0] - began,
        "whole_warm_s": time.perf_counter() - began,
        "cold_to_first_new_step_s": time.time() - (time.perf_counter() - flows.STARTS[0]) - began_cold,
        "steps_run_again": len(flows.STARTS) - (int(os.environ["BENCH_LEFT"])),
    }


def timing(starts: list[float], steps: int, began: float, ended: float, cpu: float) -> dict[str, Any]:
    starts = sorted(starts)
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    working = starts[-1] - starts[0]
    return {
        **spread(gaps),
        "first_step_s": starts[0] - began,
        "per_step_ms": 1000 * working / max(1, len(gaps)),
        "steps_per_s": len(gaps) / working if working else 0,
        "cpu_ms_per_step": 1000 * (time.process_time() - cpu) / steps,
        "whole_run_s": ended - began,
        "whole_run_ms_per_step": 1000 * (ended - began) / steps,
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def spread(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "median_ms": 1000 * statistics.median(ordered),
        "p99_ms": 1000 * ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
    }


def objects() -> tuple[int, int]:
    """How many objects, and bytes, the artifact store holds."""
    from zenml.client import Client

    store = Client().active_stack.artifact_store
    found = size = 0
    for folder, _, files in store.walk(store.path):
        for name in files:
            found, size = found + 1, size + (store.size(os.path.join(str(folder), str(name))) or 0)
    return found, size


# --- in the parent -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def stack_environment(stack: str) -> Iterator[dict[str, str]]:
    """The environment of children that use a ZenML of their own on this stack."""
    with (
        tempfile.TemporaryDirectory(prefix="kitaru-bench-", dir=os.environ.get("BENCH_DIR")) as folder,
        contextlib.ExitStack() as services,
    ):
        env = {
            **os.environ,
            "ZENML_CONFIG_PATH": f"{folder}/zenml",
            "ZENML_ANALYTICS_OPT_IN": "false",
            "ZENML_LOGGING_VERBOSITY": "ERROR",
            "AUTO_OPEN_DASHBOARD": "false",
            "KITARU_PROGRESS": "0",
            "PYTHONPATH": str(HERE),
        }
        os.makedirs(env["ZENML_CONFIG_PATH"])
        if stack == "s3":
            from kitaru_zenml_stacks import loopback

            s3 = services.enter_context(loopback.moto_s3())
            server = services.enter_context(loopback.zenml_server(Path(folder) / "server"))
            env |= server.client_env(Path(folder) / "zenml")
            env |= {"BENCH_S3": json.dumps(s3.artifact_store_config())}
            child(env, "register", 0, 0)
        yield env


def child(env: dict[str, str], what: str, steps: int, size: int) -> dict[str, Any]:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--child", what, "--steps", str(steps), "--size", str(size)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3000)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode not in (0, -signal.SIGKILL) or (not lines and done.returncode == 0):
        raise RuntimeError(f"{what} failed with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads(lines[-1][7:]) if lines else {}


def register() -> dict[str, Any]:
    """Register the S3 artifact store and a stack with it, and make it the active one."""
    from zenml.client import Client
    from zenml.enums import StackComponentType

    client, config = Client(), json.loads(os.environ["BENCH_S3"])
    store = client.create_stack_component("s3", "s3", StackComponentType.ARTIFACT_STORE, configuration=config)
    orchestrator = client.active_stack_model.components[StackComponentType.ORCHESTRATOR][0]
    stack = client.create_stack(
        "s3", {StackComponentType.ARTIFACT_STORE: store.id, StackComponentType.ORCHESTRATOR: orchestrator.id}
    )
    client.activate_stack(stack.id)
    return {}


def killed_run(env: dict[str, str], steps: int, size: int, more: int) -> str:
    """A run that was killed in its step `steps`."""
    child({**env, "BENCH_KILL_AT": str(steps)}, "to be killed", steps + more, size)
    return str(child(env, "newest run", 0, 0)["id"])


def newest_run() -> dict[str, Any]:
    from zenml.client import Client

    return {"id": str(Client().list_pipeline_runs(sort_by="desc:created", size=1).items[0].id)}


def to_be_killed(steps: int, size: int) -> dict[str, Any]:
    import flows

    flows.sequential.run(steps, size)
    return {}


def bench(stack: str, steps: int, native_steps: int, finished: int) -> dict[str, Any]:
    """All measurements on one stack."""
    found: dict[str, Any] = {}
    with stack_environment(stack) as env:
        for label, size in SIZES.items():
            for what in ("floor", "async", "sync", "native", "floor 16-way", "async 16-way", "sync 16-way", "native 16-way"):
                count = native_steps if "native" in what else max(10, steps // 4) if what.startswith("sync") else steps
                found[f"{what}, {label}"] = child(env, what, count, size)
                show(stack, f"{what}, {label}", found[f"{what}, {label}"])
        found["chat"] = child(env, "chat", 200, 0)
        show(stack, "chat of 200 turns", found["chat"])
        more = 5
        run_id = killed_run(env, finished, 2_000, more)
        extra = {"BENCH_RUN": run_id, "BENCH_LEFT": str(more), "BENCH_BEGAN": str(time.time())}
        found["resume"] = child({**env, **extra}, "resume", finished + 1, 2_000)
        show(stack, f"resume of {finished} finished steps", found["resume"])
    return found


def show(stack: str, what: str, result: dict[str, Any]) -> None:
    facts = ", ".join(f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in result.items())
    print(f"[{stack}] {what}: {facts}", flush=True)


def summary(results: dict[str, Any]) -> list[str]:
    """What the issue of the day asks of it, in words."""
    lines = []
    for stack, found in results["stacks"].items():
        for label in SIZES:
            low, our, other = (found[f"{what}, {label}"] for what in ("floor", "async", "native"))
            lines.append(
                f"{stack}, {label}: a step takes {our['median_ms']:.2f} ms, {our['median_ms'] / low['median_ms']:.2f} times the floor "
                f"(+{our['median_ms'] - low['median_ms']:.2f} ms); a native step {other['median_ms']:.0f} ms, "
                f"{other['median_ms'] / our['median_ms']:.0f} times ours; whole run {our['whole_run_ms_per_step']:.1f} ms a step, "
                f"native {other['whole_run_ms_per_step']:.1f}"
            )
        lines.append(f"{stack}: a chat of 200 turns stores {found['chat']['ratio']:.2f} times its messages")
        resumed = found["resume"]
        lines.append(
            f"{stack}: resume of {resumed['finished_steps']} finished steps: {resumed['warm_to_first_new_step_s']:.2f} s to the first new "
            f"step with a warm client, {resumed['cold_to_first_new_step_s']:.2f} s from a cold start"
        )
    lines.append(f"kitaru --help takes {results['help_s']:.2f} s")
    return lines


def help_time() -> float:
    command = [str(Path(sys.executable).with_name("kitaru")), "--help"]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    """Run the benchmark, or one measurement of it."""
    cli = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    cli.add_argument("--stack", choices=["local", "s3"], action="append")
    cli.add_argument("--steps", type=int, default=300)
    cli.add_argument("--native-steps", type=int, default=40)
    cli.add_argument("--finished", type=int, default=1000)
    cli.add_argument("--size", type=int, default=0)
    cli.add_argument("--child")
    cli.add_argument("--out", type=Path, default=RESULTS / "step_overhead.json")
    args = cli.parse_args()
    if args.child:
        special = {"register": register, "newest run": newest_run, "to be killed": lambda: to_be_killed(args.steps, args.size)}
        result = special[args.child]() if args.child in special else measure(args.child, args.steps, args.size)
        print("RESULT " + json.dumps(result))
        return
    stacks = {stack: bench(stack, args.steps, args.native_steps, args.finished) for stack in args.stack or ["local", "s3"]}
    machine = {
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "system": platform.release(),
    }
    results = {"machine": machine, "steps": args.steps, "help_s": help_time(), "stacks": stacks}
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(summary(results)), flush=True)


if __name__ == "__main__":
    main()
