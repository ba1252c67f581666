"""Compares a training step of gridgrad with the same step of PyTorch, on this machine's processor or GPU.

Both train the same CrossFormer on random images: forward, cross entropy, backward, AdamW. They take turns, each round in a new
process, so that what else the machine does meets both. Prints a Markdown table.

    cargo build --release
    python benches/compare_step.py --model small --batch 8 --image 224 --threads 2
    python benches/compare_step.py --short        # seconds: does it run?
    python benches/compare_step.py --model small --batch 256 --device cuda --bf16 --compile --python python3

The first run installs PyTorch; see pytorch/install.py. On a busy machine PyTorch's threads lose much time in waiting for one
another: compare the processor time of one thread there (--threads 1), or set OMP_WAIT_POLICY=passive.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

BENCHES = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHES / "pytorch"))

import install


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a round")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--fused", action="store_true", help="PyTorch's AdamW in one kernel, not its default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--bf16", action="store_true", help="both compute in bf16, with weights in f32")
    parser.add_argument("--compile", action="store_true", help="PyTorch under torch.compile as well")
    parser.add_argument("--python", type=Path, help="a Python with PyTorch, in place of the one that is installed")
    parser.add_argument("--gridgrad", type=Path, default=BENCHES.parent / "target" / "release" / "gridgrad")
    parser.add_argument("--short", action="store_true", help="one step of one small image, to see that everything runs")
    args = parser.parse_args()
    if args.short:
        args.model, args.batch, args.image, args.rounds, args.steps, args.warmup = "tiny", 1, 64, 1, 1, 0
    if not args.gridgrad.exists():
        parser.error(f"{args.gridgrad} does not exist; `cargo build --release` makes it")
    return args


def run(command: list) -> dict:
    """The report of one round: the line of JSON that `command` prints."""
    return json.loads(subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True).stdout)


def measure(args: argparse.Namespace) -> dict[str, list[dict]]:
    options = ["--model", args.model, "--batch", args.batch, "--image", args.image]
    options += ["--threads", args.threads, "--steps", args.steps, "--warmup", args.warmup]
    options += ["--device", args.device]
    pytorch = [args.python or install.interpreter(), BENCHES / "pytorch" / "step.py", *options]
    pytorch += ["--fused"] * args.fused + ["--bf16"] * args.bf16
    gridgrad = [args.gridgrad, "bench", "step", "--json", *options, *["--precision", "bf16"] * args.bf16]
    commands = {"PyTorch": pytorch, "gridgrad": gridgrad}
    if args.compile:
        commands["PyTorch compiled"] = [*pytorch, "--compile"]
    reports = {name: [] for name in commands}
    for number in range(args.rounds):
        order = list(commands) if number % 2 == 0 else list(reversed(commands))
        for name in order:
            reports[name].append(run(commands[name]))
        walls = ", ".join(f"{name} {reports[name][-1]['wall_ms']:.0f} ms" for name in commands)
        print(f"round {number + 1} of {args.rounds}: {walls}", file=sys.stderr)
    return reports


def row(name: str, rounds: list[dict], batch: int) -> str:
    steps = sorted(step for report in rounds for step in report["steps_ms"])
    quarter = len(steps) // 4
    spread = (steps[-1 - quarter] - steps[quarter]) / statistics.median(steps)
    cpu = statistics.median(report["cpu_ms"] for report in rounds)
    peak = max(report["peak_bytes"] for report in rounds) / 1e9
    median = statistics.median(steps)
    speed = 1e3 * batch / median
    return f"| {name} | {median:.0f} | {steps[0]:.0f} | {100 * spread:.0f} % | {speed:.1f} | {cpu:.0f} | {peak:.2f} |"


def ratio(reports: dict[str, list[dict]], name: str, key: str) -> float:
    """The other's time over gridgrad's, of each the median over rounds."""
    return statistics.median(report[key] for report in reports[name]) / statistics.median(
        report[key] for report in reports["gridgrad"]
    )


def main() -> None:
    args = parse_arguments()
    reports = measure(args)
    version = reports["PyTorch"][0]["torch"]
    held = reports["PyTorch"][0]["start_bytes"] / 1e9
    print(f"CrossFormer {args.model}, batch {args.batch}, {args.image} × {args.image}; threads: {args.threads}, ", end="")
    print(f"rounds: {args.rounds}, steps of a round: {args.steps}\n")
    print("| | median ms | best ms | spread | images/s | processor ms | peak GB |")
    print("|---|---|---|---|---|---|---|")
    titles = {"PyTorch": f"PyTorch {version}, {'fused' if args.fused else 'eager'}", "PyTorch compiled": f"PyTorch {version}, compiled"}
    for name in reports:
        print(row(titles.get(name, name), reports[name], args.batch))
    print()
    for name in reports:
        if name != "gridgrad":
            wall, cpu = ratio(reports, name, "wall_ms"), ratio(reports, name, "cpu_ms")
            print(f"{name} takes {wall:.2f} times gridgrad's wall time and {cpu:.2f} times its processor time (ratios of medians).")
    print("Spread: middle half of the steps over the median. ", end="")
    if args.device == "cpu":
        print(f"PyTorch's peak includes the {held:.2f} GB of the imported library.")
    else:
        print("Peak: tensors on the device.")


if __name__ == "__main__":
    main()
