"""Compares one training step of gridgrad with the same step of PyTorch, on a GPU or the processor, in f32 or bf16.

Both train the same network on random images: forward, cross entropy, backward, AdamW. They take turns, each round in a new
process, so that what else the machine does meets both. Prints a Markdown table. compare_cpu.py compares all networks and ops on the
processor, in more modes of PyTorch.

    cargo build --release
    python benches/compare_step.py --model small --batch 256 --device cuda --bf16 --compile --python python3
    python benches/compare_step.py --short        # seconds, on the processor: does it run?

Without --python the first run installs PyTorch for the processor; see pytorch/install.py.
"""

import argparse
import sys
from pathlib import Path

import comparison
from comparison import BENCHES, report

sys.path.insert(0, str(BENCHES / "pytorch"))

import install


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--fused", action="store_true", help="PyTorch's AdamW in one kernel, not its default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--bf16", action="store_true", help="both compute in bf16, with weights in f32")
    parser.add_argument("--compile", action="store_true", help="PyTorch under torch.compile as well")
    parser.add_argument("--python", type=Path, help="a Python with PyTorch, in place of the one that is installed")
    comparison.add_arguments(parser)
    args = comparison.parse_arguments(parser)
    if args.short:
        args.model, args.batch, args.image = "tiny", 1, 64
    return args


def main() -> None:
    args = parse_arguments()
    pytorch = [args.python or install.interpreter(), BENCHES / "pytorch" / "step.py", "--device", args.device]
    pytorch += ["--threads", args.threads, *["--fused"] * args.fused, *["--bf16"] * args.bf16]
    modes = {"PyTorch": [], **({"PyTorch, compiled": ["--compile"]} if args.compile else {})}

    def others(_: str, options: list) -> dict:
        return {name: lambda flags=flags: report([*pytorch, *options, *flags]) for name, flags in modes.items()}

    ours = ["--device", args.device, *["--precision", "bf16"] * args.bf16]
    rows = comparison.measure_networks(args, "step", [(args.model, args.batch, args.image)], others, ours)
    where = f"{args.device}, {'bf16' if args.bf16 else 'f32'}; threads: {args.threads}, rounds: {args.rounds}"
    comparison.print_networks(f"Training step on {where}", rows, None)
    versions = {found["torch"] for row in rows for reports in row["reports"].values() for found in reports if "torch" in found}
    peak = "resident memory of the process" if args.device == "cpu" else "tensors on the device"
    print(f"\nPyTorch {', '.join(versions)}{', AdamW fused' if args.fused else ''}. Peak: {peak}.")
    comparison.finish(args, rows, None)


if __name__ == "__main__":
    main()
