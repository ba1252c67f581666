"""Compares gridgrad with candle and burn on this machine's processor: training steps, and single ops.

All get the same threads and take turns, so that what else the machine does meets all. Prints Markdown tables, and with --json FILE
writes all numbers.

    cargo build --release
    python benches/compare_rust.py                       # everything: hours, most of them for ops' convolutions and CrossFormers
    python benches/compare_rust.py --parts steps --networks nin,block --rounds 3
    python benches/compare_rust.py --parts ops --only layer_norm
    python benches/compare_rust.py --short               # a minute after the build: does it run?

The first run builds the crate in neighbours/, which has the networks in candle and in burn: hundreds of crates, minutes. It is built for
this very processor (-C target-cpu=native), with AVX-512 in the matrix products of both and burn's `flex` backend; gridgrad is the
program that --gridgrad names, built for any processor, and chooses its instructions as it starts. All compute in f32, but with
--bf16 gridgrad in bf16, step by AdamW with the same settings, and keep freed memory in the process. Where candle has no gradient
(windows of pools that overlap) it computes less: 2 × 2 windows in Network-in-Network.
"""

import argparse
import os
import subprocess
from pathlib import Path

import comparison
from comparison import BENCHES, KEEP_MEMORY, report

FRAMEWORKS = ["candle", "burn"]
# (name of the network, batch, side of the images; of the map, for the block)
STEPS = [("nin", 128, 28), ("block", 8, 56), ("resnet18", 128, 32), ("tiny", 8, 224), ("small", 8, 224)]
SHORT = [("nin", 2, 28), ("block", 1, 14), ("resnet18", 1, 8)]
OPS = ("linear", "layer_norm", "softmax", "gelu", "relu", "add", "conv2d")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,ops", help="of steps, ops")
    parser.add_argument("--networks", default=",".join(name for name, *_ in STEPS))
    parser.add_argument("--frameworks", default=",".join(FRAMEWORKS), help="of candle, burn")
    parser.add_argument("--only", help="ops whose line in `gridgrad bench ops --list` holds this text")
    parser.add_argument("--milliseconds", type=int, default=200, help="for each op, framework, direction and round")
    comparison.add_arguments(parser)
    args = comparison.parse_arguments(parser)
    args.frameworks = args.frameworks.split(",")
    return args


def build() -> Path:
    """The program that runs candle and burn."""
    folder = Path(os.environ.get("CARGO_TARGET_DIR", BENCHES.parent / "target")).absolute() / "neighbours"
    manifest = BENCHES / "neighbours" / "Cargo.toml"
    command = ["cargo", "build", "--release", "--locked", "--manifest-path", manifest, "--target-dir", folder]
    subprocess.run(list(map(str, command)), check=True, env={**os.environ, "RUSTFLAGS": "-C target-cpu=native"})
    return folder / "release" / "neighbours"


def main() -> None:
    args = parse_arguments()
    program, peak = build(), comparison.limits(args)
    environment = {**KEEP_MEMORY, "RAYON_NUM_THREADS": str(args.threads)}

    def training(_: str, options: list) -> dict:
        command = lambda framework: [program, "step", framework, *options]
        return {framework: lambda framework=framework: report(command(framework), environment) for framework in args.frameworks}

    parts, steps, single = args.parts.split(","), [], []
    if "steps" in parts:
        cases = [case for case in (SHORT if args.short else STEPS) if case[0] in args.networks.split(",")]
        steps = comparison.measure_networks(args, "step", cases, training)
    if "ops" in parts:
        ops = [op for op in comparison.listed_ops(args) if op["op"] in OPS]
        with comparison.Worker([program, "ops", "--milliseconds", args.milliseconds], environment) as worker:

            def one(op: dict) -> dict:
                return {framework: lambda framework=framework: worker.ask(op, framework) for framework in args.frameworks}

            single = comparison.measure_ops(args, ops, one)
    comparison.print_limits(args, peak)
    comparison.print_networks("Training steps", steps, peak)
    comparison.print_ops(single, peak, args.frameworks)
    comparison.finish(args, steps + single, peak)


if __name__ == "__main__":
    main()
