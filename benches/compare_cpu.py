"""Compares gridgrad with PyTorch on this machine's processor: training steps, inference, and every op by itself.

Both get the same threads and take turns, so that what else the machine does meets both. PyTorch runs in several modes, and what
counts is the best of them. Prints Markdown tables, and with --json FILE writes all numbers.

    cargo build --release
    python benches/compare_cpu.py                        # everything: about an hour
    python benches/compare_cpu.py --parts steps --networks small,nin
    python benches/compare_cpu.py --parts steps,inference --bf16    # PyTorch by autocast
    python benches/compare_cpu.py --parts ops --only conv2d
    python benches/compare_cpu.py --short                # a minute: does it run?

The first run installs PyTorch; see pytorch/install.py. Modes of PyTorch: `eager`, its defaults; `channels-last`, maps in that
layout; `fused`, the optimizer in one kernel and the allocator keeping freed memory, channels-last for convolutional networks;
`compiled`, torch.compile. On a busy machine PyTorch's threads lose much time in waiting for one another: compare the processor
time of one thread there (--threads 1), or set OMP_WAIT_POLICY=passive.
"""

import argparse
import sys

import comparison
from comparison import BENCHES, KEEP_MEMORY, report

sys.path.insert(0, str(BENCHES / "pytorch"))

import install

# (name of the network, batch, side of the images)
STEPS = [("tiny", 8, 224), ("small", 8, 224), ("resnet18", 128, 32), ("nin", 128, 28), ("block", 8, 56)]
INFERENCE = [(name, batch, side) for name, _, side in STEPS if name != "block" for batch in (1, 8)]
SHORT = [("tiny", 1, 64), ("nin", 2, 28), ("block", 1, 14)]
STEP_MODES = ("eager", "channels-last", "fused", "compiled")
INFERENCE_MODES = ("eager", "channels-last", "compiled")
OP_MODES = ("eager", "channels-last", "compiled")
CONVOLUTIONAL = ("resnet18", "nin")
# That channels-last does not suit the others is no news.
OPS_OF_MAPS = ("conv2d", "batch_norm", "max_pool", "avg_pool", "global_avg_pool", "cross_scale_embedding")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="steps,inference,ops", help="of steps, inference, ops")
    parser.add_argument("--networks", default=",".join(name for name, *_ in STEPS))
    parser.add_argument("--only", help="ops whose line in `gridgrad bench ops --list` holds this text")
    parser.add_argument("--modes", help="of PyTorch; all where absent, eager with --short")
    parser.add_argument("--milliseconds", type=int, default=200, help="for each op, mode, direction and round")
    comparison.add_arguments(parser)
    args = comparison.parse_arguments(parser)
    args.modes = args.modes or ("eager" if args.short else None)
    return args


def wanted(args: argparse.Namespace, modes: tuple) -> list[str]:
    return [mode for mode in modes if not args.modes or mode in args.modes.split(",")]


def flags(mode: str, network: str) -> list[str]:
    """What pytorch/step.py calls a mode."""
    if mode == "fused":
        return ["--fused", *["--channels-last"] * (network in CONVOLUTIONAL)]
    return {"eager": [], "channels-last": ["--channels-last"], "compiled": ["--compile"]}[mode]


def networks(args: argparse.Namespace, kind: str, cases: list, modes: tuple) -> list[dict]:
    python = install.interpreter()

    def pytorch(name: str, options: list) -> dict:
        runs = {}
        for mode in wanted(args, modes):
            command = [python, BENCHES / "pytorch" / "step.py", *options, "--threads", args.threads, *flags(mode, name)]
            command += ["--inference"] * (kind == "inference") + ["--bf16"] * args.bf16
            environment = KEEP_MEMORY if mode == "fused" else None
            runs[f"PyTorch, {mode}"] = lambda command=command, environment=environment: report(command, environment)
        return runs

    chosen = [case for case in (SHORT if args.short else cases) if case[0] in args.networks.split(",")]
    return comparison.measure_networks(args, kind, chosen, pytorch)


def ops(args: argparse.Namespace) -> list[dict]:
    command = [install.interpreter(), BENCHES / "pytorch" / "ops.py", "--threads", args.threads]
    with comparison.Worker([*command, "--milliseconds", args.milliseconds]) as worker:

        def pytorch(op: dict) -> dict:
            modes = wanted(args, OP_MODES)
            modes = [mode for mode in modes if mode != "channels-last" or op["op"] in OPS_OF_MAPS]
            return {f"PyTorch, {mode}": lambda mode=mode: worker.ask(op, mode) for mode in modes}

        return comparison.measure_ops(args, comparison.listed_ops(args), pytorch)


def main() -> None:
    args = parse_arguments()
    peak = comparison.limits(args)
    parts = args.parts.split(",")
    steps = networks(args, "step", STEPS, STEP_MODES) if "steps" in parts else []
    inference = networks(args, "inference", INFERENCE, INFERENCE_MODES) if "inference" in parts else []
    single = ops(args) if "ops" in parts else []
    comparison.print_limits(args, peak)
    comparison.print_networks("Training steps", steps, peak)
    comparison.print_networks("Inference", inference, peak)
    comparison.print_ops(single, peak, ["PyTorch"])
    comparison.finish(args, steps + inference + single, peak)


if __name__ == "__main__":
    main()
