"""Times training steps of the eager PyTorch CrossFormer; the counterpart of `gridgrad bench step`.

Prints one line of JSON with the keys of `gridgrad bench step --json` that have a meaning here, and `start_bytes`: the memory that
PyTorch holds before there is a network. Runs in the environment that install.py makes.

    python step.py --model small --batch 8 --image 224 --threads 2 --steps 5
"""

import argparse
import json
import statistics
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from torch.nn import functional

import crossformer


def memory(key: str) -> int:
    """Bytes of an entry of the process's status: resident now (VmRSS) or at most so far (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[key].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=crossformer.SIZES)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="AdamW in one kernel per parameter, not the default")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start_bytes = memory("VmRSS")
    model = crossformer.CrossFormer(img_size=args.image, **crossformer.config(args.model)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=args.fused or None)
    images = torch.randn(args.batch, 3, args.image, args.image)
    labels = torch.randint(1000, (args.batch,))

    def step() -> list[float]:
        times = [time.perf_counter()]
        optimizer.zero_grad(set_to_none=True)
        loss = functional.cross_entropy(model(images), labels)
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        times.append(time.perf_counter())
        parts = [1e3 * (end - start) for start, end in zip(times, times[1:])]
        return [sum(parts), *parts]

    for _ in range(args.warmup):
        step()
    cpu = time.process_time()
    steps = [step() for _ in range(args.steps)]
    cpu = time.process_time() - cpu
    wall, forward, backward, update = (statistics.median(times) for times in zip(*steps))
    report = {
        "torch": torch.__version__,
        "wall_ms": wall,
        "forward_ms": forward,
        "backward_ms": backward,
        "optimizer_ms": update,
        "cpu_ms": 1e3 * cpu / args.steps,
        "start_bytes": start_bytes,
        "peak_bytes": memory("VmHWM"),
        "steps_ms": [times[0] for times in steps],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
