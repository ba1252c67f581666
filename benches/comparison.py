"""What the scripts that set gridgrad beside other frameworks share: taking turns, medians, tables.

Every measurement is a process that prints a line of JSON. They take turns, so that what else the machine does meets all.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

BENCHES = Path(__file__).resolve().parent
GRIDGRAD = "gridgrad"
# The C library then keeps what is freed for the next step and does not give it back to the system.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "67108864"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that all comparisons have."""
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a round")
    parser.add_argument("--gridgrad", type=Path, default=BENCHES.parent / "target" / "release" / "gridgrad")
    parser.add_argument("--bf16", action="store_true", help="networks compute in bf16, in frameworks that can")
    parser.add_argument("--json", type=Path, help="writes all measurements to this file")
    parser.add_argument("--short", action="store_true", help="a few small measurements: does everything run? Fails if not")


def parse_arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if not args.gridgrad.exists():
        parser.error(f"{args.gridgrad} does not exist; `cargo build --release` makes it")
    args.warmup = 2
    if args.short:
        args.rounds, args.steps, args.milliseconds, args.warmup = 1, 1, 1, 0
    return args


def report(command: list, environment: dict[str, str] | None = None) -> dict:
    """The line of JSON that `command` prints, or an `error`."""
    run = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    if run.returncode != 0:
        said = run.stderr.decode(errors="replace").strip().splitlines()
        return {"error": said[-1] if said else f"exit status {run.returncode}"}
    return json.loads(run.stdout.splitlines()[-1])


def limits(args: argparse.Namespace) -> dict:
    """What this machine's processor can do at most, as gridgrad measures it."""
    peak = report([args.gridgrad, "bench", "peak", "--json", "--threads", args.threads])
    if "error" in peak:
        sys.exit(f"{args.gridgrad} bench peak: {peak['error']}")
    return peak


def take_turns(runs: dict, rounds: int, what: str) -> dict:
    """What each of `runs` returns, `rounds` times, first in order and then in the opposite one; and errors."""
    reports, errors = {name: [] for name in runs}, []
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
            answer = runs[name]()
            if "error" in answer:
                errors.append(f"{what}, {name}: {answer['error']}")
                print(errors[-1], file=sys.stderr)
            else:
                reports[name].append(answer)
    return {"reports": {name: found for name, found in reports.items() if found}, "errors": errors}


def median_of(reports: list[dict], key: str) -> float:
    return statistics.median(report[key] for report in reports)


def spread(reports: list[dict], key: str) -> float:
    """The range of the rounds' medians over their median."""
    values = [report[key] for report in reports]
    return (max(values) - min(values)) / statistics.median(values)


def fastest(reports: dict[str, list[dict]], key: str, framework: str = "") -> str | None:
    """The other framework's mode with the least median."""
    others = (name for name in reports if name != GRIDGRAD and name.startswith(framework))
    return min(others, key=lambda name: median_of(reports[name], key), default=None)


def measure_networks(args: argparse.Namespace, kind: str, cases: list, others, more: list = ()) -> list[dict]:
    """Steps, or inference, of (name, batch, side) in gridgrad and in `others(name, options)`, runs by their names."""
    rows = []
    for name, batch, side in cases:
        count = args.steps if kind == "step" else 4 * args.steps
        options = ["--model", name, "--batch", batch, "--image", side, "--steps", count, "--warmup", args.warmup]
        command = [args.gridgrad, "bench", kind, "--json", *options, "--threads", args.threads, *more]
        command += ["--precision", "bf16"] * args.bf16
        runs = {GRIDGRAD: lambda command=command: report(command), **others(name, options)}
        measured = take_turns(runs, args.rounds, f"{name}, batch {batch}")
        rows.append({"kind": kind, "model": name, "batch": batch, "image": side, **measured})
        print(f"{kind} of {name}, batch {batch}: done", file=sys.stderr)
    return rows


def print_networks(title: str, rows: list[dict], peak: dict | None) -> None:
    """A table with a line for each framework; without `peak`, none of shares of it."""
    if not rows:
        return
    print(f"\n## {title}\n")
    print("| network | | median ms | spread | GFLOP/s | of peak | processor ms | peak GB | gridgrad's time over this |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        reports = row["reports"]
        if GRIDGRAD not in reports or len(reports) < 2:
            continue
        ours = median_of(reports[GRIDGRAD], "wall_ms")
        work = median_of(reports[GRIDGRAD], "gflops") * ours
        best = fastest(reports, "wall_ms")
        for name, found in reports.items():
            wall = median_of(found, "wall_ms")
            cpu = f"{median_of(found, 'cpu_ms'):.0f}" if found[0].get("cpu_ms") is not None else ""
            memory = f"{max(report['peak_bytes'] for report in found) / 1e9:.2f}" if found[0].get("peak_bytes") else ""
            ratio = "" if name == GRIDGRAD else f"{ours / wall:.2f}{' (best)' if name == best else ''}"
            label = f"{row['model']}, {row['batch']} × {row['image']}²"
            share = f"{100 * work / wall / peak['gflops']:.0f} %" if peak else ""
            print(
                f"| {label} | {name} | {wall:.1f} | {100 * spread(found, 'wall_ms'):.0f} % "
                f"| {work / wall:.0f} | {share} | {cpu} | {memory} | {ratio} |"
            )


class Worker:
    """A process that times one op after another: a line of JSON in, a line of JSON out."""

    def __init__(self, command: list, environment: dict[str, str] | None = None):
        environment = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        # A process that still starts would share the processors with the first measurement of another: no such op is an error,
        # but the answer comes when it has started.
        self.ask({"op": "none"}, "none")

    def ask(self, op: dict, mode: str) -> dict:
        self.process.stdin.write(json.dumps({"op": op, "mode": mode}) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"the process ended with {self.process.wait()}"}

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()


def listed_ops(args: argparse.Namespace) -> list[dict]:
    """gridgrad's ops whose line holds what --only says; with --short the smallest of each kind."""
    listed = subprocess.run([args.gridgrad, "bench", "ops", "--list"], stdout=subprocess.PIPE, check=True).stdout
    ops = [json.loads(line) for line in listed.splitlines()]
    ops = [op for op in ops if not args.only or args.only in json.dumps(op, separators=(",", ":"))]
    if args.short:
        ops = list({op["op"]: op for op in sorted(ops, key=lambda op: -op["flops"])}.values())
    return ops


def measure_ops(args: argparse.Namespace, ops: list[dict], others) -> list[dict]:
    """Each op in gridgrad and in `others(op)`, runs by their names."""
    rows = []
    for number, op in enumerate(ops, start=1):
        command = [args.gridgrad, "bench", "ops", "--json", "--number", op["number"], "--threads", args.threads]
        command += ["--milliseconds", args.milliseconds]
        runs = {GRIDGRAD: lambda command=command: report(command), **others(op)}
        rows.append({"kind": "op", "op": op, **take_turns(runs, args.rounds, op["op"])})
        print(f"op {number} of {len(ops)}: done", file=sys.stderr)
    return rows


def print_ops(rows: list[dict], peak: dict, frameworks: list[str]) -> None:
    if not rows:
        return
    print("\n## Ops\n")
    print("Forward, and forward with backward; a ratio is gridgrad's time over that of a framework's fastest mode.\n")
    theirs = "".join(f" {framework} ms | ratio |" for framework in frameworks)
    print(f"| op | forward ms | GFLOP/s | of peak | GB/s | of copy |{theirs} both ms |{theirs}")
    print("|---" * (7 + 4 * len(frameworks)) + "|")
    for row in rows:
        op, reports = row["op"], row["reports"]
        if GRIDGRAD not in reports or len(reports) < 2:
            continue
        hidden = ("number", "op", "flops", "bytes", "image")
        label = op["op"] + " " + ", ".join(f"{key} {value}" for key, value in op.items() if key not in hidden)
        cells = []
        for key in ("forward_ms", "both_ms"):
            ours = median_of(reports[GRIDGRAD], key)
            cells.append(f"{ours:.3f}")
            if key == "forward_ms":
                gflops, gigabytes = op["flops"] / ours / 1e6, op["bytes"] / ours / 1e6
                cells += [f"{gflops:.1f}", f"{100 * gflops / peak['gflops']:.0f} %"]
                cells += [f"{gigabytes:.1f}", f"{100 * gigabytes / peak['copy_gb_per_s']:.0f} %"]
            for framework in frameworks:
                best = fastest(reports, key, framework)
                time = median_of(reports[best], key) if best else None
                cells += [f"{time:.3f}", f"{ours / time:.2f}"] if best else ["", ""]
        print(f"| {label} | " + " | ".join(cells) + " |")


def finish(args: argparse.Namespace, rows: list[dict], peak: dict | None) -> None:
    """Writes what --json asks for. A short run fails where anything did."""
    print("\nSpread: the range of the rounds' medians over their median. Processor time is of all threads, for a step.")
    if args.json:
        args.json.write_text(json.dumps({"peak": peak, "rows": rows}, indent=1))
    errors = [error for row in rows for error in row["errors"]]
    if args.short and (errors or not rows):
        sys.exit("; ".join(errors) or "nothing was measured")


def print_limits(args: argparse.Namespace, peak: dict) -> None:
    print(f"Threads: {args.threads}, rounds: {args.rounds}. Peak of this machine, measured: {peak['gflops']:.0f} GFLOP/s of")
    print(f"{peak['instruction_set']} multiply-adds in f32, {peak['copy_gb_per_s']:.1f} GB/s copied (read and written).")
