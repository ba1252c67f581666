"""Compares training many small networks with gridgrad and in a loop of eager PyTorch, on this machine's processor.

Both train the same number of Network-in-Networks by the published recipe of Finite Aggregation, each on its own subset of the same
grey images, made here. They take turns, each round in a new process. Prints a Markdown table.

    cargo build --release --example many_models
    python benches/finite_aggregation.py --models 4 --samples 50 --epochs 3 --threads 2
    python benches/finite_aggregation.py --short        # seconds: does it run?

The first run installs PyTorch; see pytorch/install.py. On a busy machine PyTorch's threads lose much time in waiting for one
another: compare the processor time of one thread there (--threads 1), or set OMP_WAIT_POLICY=passive.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

BENCHES = Path(__file__).resolve().parent
sys.path.insert(0, str(BENCHES / "pytorch"))

import install

CLASSES = 10


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--samples", type=int, default=50, help="of each model")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--side", type=int, default=28, help="height and width of the images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    program = BENCHES.parent / "target" / "release" / "examples" / "many_models"
    parser.add_argument("--gridgrad", type=Path, default=program, help="the compiled examples/many_models.rs")
    parser.add_argument("--short", action="store_true", help="two tiny models for one epoch, to see that everything runs")
    args = parser.parse_args()
    if args.short:
        args.models, args.samples, args.epochs, args.side, args.rounds = 2, 4, 1, 8, 1
    if not args.gridgrad.exists():
        parser.error(f"{args.gridgrad} does not exist; `cargo build --release --example many_models` makes it")
    return args


def make_data(folder: Path, samples: int, side: int) -> list[Path]:
    """Noise with a bright line whose row or column tells the class."""
    draws = random.Random(0)
    labels = bytes(draws.randrange(CLASSES) for _ in range(samples))
    pixels = bytearray(draws.randbytes(samples * side * side))
    for sample, label in enumerate(labels):
        line, across = label // 2 * side // (CLASSES // 2), label % 2 == 0
        for at in range(side):
            row, column = (line, at) if across else (at, line)
            pixels[(sample * side + row) * side + column] = 255
    paths = [folder / "pixels", folder / "labels"]
    for path, content in zip(paths, (pixels, labels)):
        path.write_bytes(content)
    return paths


def run(command: list, environment: dict[str, str]) -> dict:
    """The report of one round: the line of JSON that `command` prints, with the processor time of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, env={**os.environ, **environment})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = sum(getattr(after, key) - getattr(before, key) for key in ("ru_utime", "ru_stime"))
    return {**json.loads(output.stdout), "cpu_s": cpu}


def measure(args: argparse.Namespace) -> dict[str, list[dict]]:
    python = install.interpreter()
    reports = {"PyTorch": [], "gridgrad": []}
    with tempfile.TemporaryDirectory() as folder:
        sizes = [*make_data(Path(folder), args.models * args.samples, args.side), args.side]
        sizes += [args.models, args.samples, args.epochs]
        threads = ["--threads", args.threads]
        commands = {"PyTorch": [python, BENCHES / "pytorch" / "many.py", *sizes, *threads], "gridgrad": [args.gridgrad, *sizes]}
        for number in range(args.rounds):
            for name in list(commands) if number % 2 == 0 else list(reversed(commands)):
                reports[name].append(run(commands[name], {"RAYON_NUM_THREADS": str(args.threads)}))
            walls = ", ".join(f"{name} {rounds[-1]['wall_s']:.1f} s" for name, rounds in reports.items())
            print(f"round {number + 1} of {args.rounds}: {walls}", file=sys.stderr)
    return reports


def median(rounds: list[dict], key: str) -> float:
    return statistics.median(report[key] for report in rounds)


def main() -> None:
    args = parse_arguments()
    reports = measure(args)
    print(f"{args.models} networks, {args.samples} images of {args.side} × {args.side} each, epochs: {args.epochs}; ", end="")
    print(f"threads: {args.threads}, rounds: {args.rounds}\n")
    print("| | median s | best s | processor s | last loss, mean of the models |")
    print("|---|---|---|---|---|")
    for name, rounds in reports.items():
        label = f"PyTorch {rounds[0]['torch']}, a loop" if name == "PyTorch" else name
        best, loss = min(report["wall_s"] for report in rounds), statistics.mean(rounds[0]["losses"])
        print(f"| {label} | {median(rounds, 'wall_s'):.2f} | {best:.2f} | {median(rounds, 'cpu_s'):.2f} | {loss:.3f} |")
    wall, cpu = (median(reports["PyTorch"], key) / median(reports["gridgrad"], key) for key in ("wall_s", "cpu_s"))
    print(f"\nPyTorch takes {wall:.2f} times gridgrad's wall time and {cpu:.2f} times its processor time (ratios of medians).")
    print("Processor times are of whole processes, with the import of PyTorch (some seconds).")


if __name__ == "__main__":
    main()
