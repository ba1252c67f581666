"""Compares gridgrad with PyTorch on this machine's processor: training steps, inference, and every op by itself.

Both get the same threads and take turns, so that what else the machine does meets both. PyTorch runs in several modes, and what
counts is the best of them. Prints Markdown tables, and with --json FILE writes all numbers.

    cargo build --release
    python benches/compare_cpu.py                        # everything: about an hour
    python benches/compare_cpu.py --parts steps --networks small,nin
    python benches/compare_cpu.py --parts ops --only conv2d
    python benches/compare_cpu.py --short                # a minute: does it run?

The first run installs PyTorch; see pytorch/install.py. Modes of PyTorch: `eager`, its defaults; `channels-last`, maps in that
layout; `fused`, the optimizer in one kernel and the allocator keeping freed memory, channels-last for convolutional networks;
`compiled`, torch.compile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

BENCHES = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHES / "pytorch"))

import install

# (name of the network, batch, side of the images)
STEPS = [("tiny", 8, 224), ("small", 8, 224), ("resnet18", 128, 32), ("nin", 128, 28)]
INFERENCE = [(name, batch, side) for name, _, side in STEPS for batch in (1, 8)]
STEP_MODES = ("eager", "channels-last", "fused", "compiled")
INFERENCE_MODES = ("eager", "channels-last", "compiled")
OP_MODES = ("eager", "channels-last", "compiled")
CONVOLUTIONAL = ("resnet18", "nin")
# The C library then keeps what is freed for the next step and does not give it back to the system.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "MALLOC_TOP_PAD_": "67108864"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,inference,ops", help="of steps, inference, ops")
    parser.add_argument("--networks", default=",".join(name for name, *_ in STEPS))
    parser.add_argument("--only", help="ops whose line in `gridgrad bench ops --list` holds this text")
    parser.add_argument("--modes", help="of PyTorch; all where absent")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a round")
    parser.add_argument("--milliseconds", type=int, default=200, help="for each op, mode, direction and round")
    parser.add_argument("--gridgrad", type=Path, default=BENCHES.parent / "target" / "release" / "gridgrad")
    parser.add_argument("--json", type=Path, help="writes all measurements to this file")
    parser.add_argument("--short", action="store_true", help="a few small measurements, to see that everything runs")
    args = parser.parse_args()
    if not args.gridgrad.exists():
        parser.error(f"{args.gridgrad} does not exist; `cargo build --release` makes it")
    if args.short:
        args.rounds, args.steps, args.milliseconds = 1, 1, 1
    return args


def report(command: list, environment: dict[str, str] | None = None) -> dict:
    """The line of JSON that `command` prints, or an `error`."""
    run = subprocess.run(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **(environment or {})}
    )
    if run.returncode != 0:
        return {"error": run.stderr.decode(errors="replace").strip().splitlines()[-1:]}
    return json.loads(run.stdout.splitlines()[-1])


def take_turns(runs: dict, rounds: int, what: str) -> dict[str, list[dict]]:
    """What each of `runs` returns, `rounds` times, first in order and then in the opposite one."""
    reports = {name: [] for name in runs}
    for number in range(rounds):
        for name in list(runs) if number % 2 == 0 else list(reversed(runs)):
            answer = runs[name]()
            if "error" in answer:
                print(f"{what}, {name}: {answer['error']}", file=sys.stderr)
            else:
                reports[name].append(answer)
    return {name: found for name, found in reports.items() if found}


def median_of(reports: list[dict], key: str) -> float:
    return statistics.median(report[key] for report in reports)


def spread(reports: list[dict], key: str) -> float:
    """The range of the rounds' medians over their median."""
    values = [report[key] for report in reports]
    return (max(values) - min(values)) / statistics.median(values)


def flags(mode: str, network: str) -> list[str]:
    """What pytorch/step.py calls a mode."""
    if mode == "fused":
        return ["--fused", *["--channels-last"] * (network in CONVOLUTIONAL)]
    return {"eager": [], "channels-last": ["--channels-last"], "compiled": ["--compile"]}[mode]


def best_mode(reports: dict[str, list[dict]], key: str) -> str:
    return min((name for name in reports if name != "gridgrad"), key=lambda name: median_of(reports[name], key))


def networks(args: argparse.Namespace, kind: str, cases: list, modes: tuple) -> list[dict]:
    python, rows = install.interpreter(), []
    wanted = args.networks.split(",")
    modes = [mode for mode in modes if not args.modes or mode in args.modes.split(",")]
    if args.short:
        cases, modes = [("tiny", 1, 64), ("nin", 2, 28)], modes[:1]
    for name, batch, side in cases:
        if name not in wanted:
            continue
        options = ["--model", name, "--batch", batch, "--image", side, "--threads", args.threads]
        count = args.steps if kind == "step" else 4 * args.steps
        options += ["--steps", count, "--warmup", 0 if args.short else 2]
        runs = {"gridgrad": lambda: report([args.gridgrad, "bench", kind, "--json", *options])}
        for mode in modes:
            extra = [] if kind == "step" else ["--inference"]
            command = [python, BENCHES / "pytorch" / "step.py", *options, *flags(mode, name), *extra]
            environment = KEEP_MEMORY if mode == "fused" else None
            runs[f"PyTorch, {mode}"] = lambda command=command, environment=environment: report(command, environment)
        reports = take_turns(runs, args.rounds, f"{name}, batch {batch}")
        rows.append({"kind": kind, "model": name, "batch": batch, "image": side, "reports": reports})
        print(f"{kind} of {name}, batch {batch}: done", file=sys.stderr)
    return rows


def print_networks(title: str, rows: list[dict], peak: dict) -> None:
    if not rows:
        return
    print(f"\n## {title}\n")
    print("| network | | median ms | spread | GFLOP/s | of peak | processor ms | peak GB | gridgrad's time over this |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        reports = row["reports"]
        if "gridgrad" not in reports or len(reports) < 2:
            continue
        ours = median_of(reports["gridgrad"], "wall_ms")
        work = median_of(reports["gridgrad"], "gflops") * ours
        best = best_mode(reports, "wall_ms")
        for name, found in reports.items():
            wall = median_of(found, "wall_ms")
            cpu = f"{median_of(found, 'cpu_ms'):.0f}" if found[0].get("cpu_ms") is not None else ""
            memory = f"{max(report['peak_bytes'] for report in found) / 1e9:.2f}" if found[0].get("peak_bytes") else ""
            ratio = "" if name == "gridgrad" else f"{ours / wall:.2f}{' (best)' if name == best else ''}"
            label = f"{row['model']}, {row['batch']} × {row['image']}²"
            share = f"{100 * work / wall / peak['gflops']:.0f} %"
            print(
                f"| {label} | {name} | {wall:.1f} | {100 * spread(found, 'wall_ms'):.0f} % "
                f"| {work / wall:.0f} | {share} | {cpu} | {memory} | {ratio} |"
            )


class Worker:
    """PyTorch in a process of its own that times one op after another."""

    def __init__(self, args: argparse.Namespace):
        command = [install.interpreter(), BENCHES / "pytorch" / "ops.py", "--threads", args.threads]
        command += ["--milliseconds", args.milliseconds]
        self.process = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, op: dict, mode: str) -> dict:
        self.process.stdin.write(json.dumps({"op": op, "mode": mode}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def ops(args: argparse.Namespace) -> list[dict]:
    listed = subprocess.run([args.gridgrad, "bench", "ops", "--list"], stdout=subprocess.PIPE, check=True).stdout
    cases = [json.loads(line) for line in listed.splitlines()]
    cases = [op for op in cases if not args.only or args.only in json.dumps(op, separators=(",", ":"))]
    modes = [mode for mode in OP_MODES if not args.modes or mode in args.modes.split(",")]
    if args.short:
        cases, modes = [op for op in cases if op["flops"] < 3e6], ["eager"]
    worker, rows = Worker(args), []
    for op in cases:
        command = [args.gridgrad, "bench", "ops", "--json", "--number", op["number"], "--threads", args.threads]
        command += ["--milliseconds", args.milliseconds]
        runs = {"gridgrad": lambda command=command: report(command)}
        for mode in modes:
            runs[f"PyTorch, {mode}"] = lambda op=op, mode=mode: worker.ask(op, mode)
        # That a mode does not suit an op is no news.
        if op["op"] not in ("conv2d", "batch_norm", "max_pool", "avg_pool", "global_avg_pool", "cross_scale_embedding"):
            runs.pop("PyTorch, channels-last", None)
        rows.append({"kind": "op", "op": op, "reports": take_turns(runs, args.rounds, op["op"])})
        print(f"op {op['number']} of {len(cases)}: done", file=sys.stderr)
    worker.process.stdin.close()
    return rows


def print_ops(rows: list[dict], peak: dict) -> None:
    if not rows:
        return
    print("\n## Ops\n")
    print("Forward, and forward with backward; the ratio is gridgrad's time over the best of PyTorch's modes.\n")
    print("| op | forward ms | GFLOP/s | of peak | GB/s | of copy | PyTorch ms | ratio | both ms | PyTorch ms | ratio |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        op, reports = row["op"], row["reports"]
        if "gridgrad" not in reports or len(reports) < 2:
            continue
        hidden = ("number", "op", "flops", "bytes", "image")
        label = op["op"] + " " + ", ".join(f"{key} {value}" for key, value in op.items() if key not in hidden)
        cells = []
        forward = median_of(reports["gridgrad"], "forward_ms")
        gflops, gigabytes = op["flops"] / forward / 1e6, op["bytes"] / forward / 1e6
        cells += [f"{gflops:.1f}", f"{100 * gflops / peak['gflops']:.0f} %"]
        cells += [f"{gigabytes:.1f}", f"{100 * gigabytes / peak['copy_gb_per_s']:.0f} %"]
        for number, key in enumerate(("forward_ms", "both_ms")):
            ours, theirs = (median_of(reports[name], key) for name in ("gridgrad", best_mode(reports, key)))
            cells += [f"{theirs:.3f}", f"{ours / theirs:.2f}"] if number == 0 else [f"{ours:.3f}", f"{theirs:.3f}", f"{ours / theirs:.2f}"]
        print(f"| {label} | {forward:.3f} | " + " | ".join(cells) + " |")


def main() -> None:
    args = parse_arguments()
    peak = report([args.gridgrad, "bench", "peak", "--json", "--threads", args.threads])
    parts = args.parts.split(",")
    rows = []
    if "steps" in parts:
        rows += networks(args, "step", STEPS, STEP_MODES)
    if "inference" in parts:
        rows += networks(args, "inference", INFERENCE, INFERENCE_MODES)
    if "ops" in parts:
        rows += ops(args)
    print(f"Threads: {args.threads}, rounds: {args.rounds}. Peak of this machine, measured: {peak['gflops']:.0f} GFLOP/s of")
    print(f"{peak['instruction_set']} multiply-adds in f32, {peak['copy_gb_per_s']:.1f} GB/s copied (read and written).")
    print_networks("Training steps", [row for row in rows if row["kind"] == "step"], peak)
    print_networks("Inference", [row for row in rows if row["kind"] == "inference"], peak)
    print_ops([row for row in rows if row["kind"] == "op"], peak)
    print("\nSpread: the range of the rounds' medians over their median. Processor time is of all threads, for a step.")
    if args.json:
        args.json.write_text(json.dumps({"peak": peak, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
