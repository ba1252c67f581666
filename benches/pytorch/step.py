"""Times training steps or, with --inference, answers of a network in PyTorch; the counterpart of `gridgrad bench`.

Prints one line of JSON with the keys of `gridgrad bench step --json` that have a meaning here, and `start_bytes`: the memory that
PyTorch holds before there is a network. Runs in the environment that install.py makes.

    python step.py --model small --batch 8 --image 224 --threads 2 --steps 5
    python step.py --model small --batch 256 --device cuda --bf16 --compile

On a GPU the step waits for the device between its parts, as `gridgrad bench step` does, and `peak_bytes` is the most memory of
tensors there.
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
import networks


def memory(key: str) -> int:
    """Bytes of an entry of the process's status: resident now (VmRSS) or at most so far (VmHWM)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(status[key].split()[0])


def make_network(name: str, image: int) -> tuple[torch.nn.Module, int, int]:
    """A network of this name, the channels of its images, and its classes."""
    if name == "resnet18":
        return networks.ResNet18(), 3, 10
    if name == "nin":
        return networks.NetworkInNetwork(), 1, 10
    if name == "block":
        return networks.TransformerBlock(image), networks.TransformerBlock.CHANNELS, 10
    return crossformer.CrossFormer(img_size=image, **crossformer.config(name)), 3, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", choices=[*crossformer.SIZES, "resnet18", "nin", "block"])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--fused", action="store_true", help="AdamW in one kernel per parameter, not the default")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--bf16", action="store_true", help="the network computes in bf16, by autocast")
    parser.add_argument("--channels-last", action="store_true", help="maps and weights of convolutions in that layout")
    parser.add_argument("--inference", action="store_true", help="answers alone, without gradients")
    parser.add_argument("--compile", action="store_true", help="torch.compile around the network")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    start_bytes = memory("VmRSS")
    model, channels, classes = make_network(args.model, args.image)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.train(not args.inference).to(device, memory_format=layout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=args.fused or None)
    network = torch.compile(model) if args.compile else model
    images = torch.randn(args.batch, channels, args.image, args.image, device=device).contiguous(memory_format=layout)
    if args.model == "block":
        images = images.permute(0, 2, 3, 1).contiguous()
    labels = torch.randint(classes, (args.batch,), device=device)

    def now() -> float:
        if on_gpu:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    def step() -> list[float]:
        times = [now()]
        if args.inference:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                network(images)
            wall = 1e3 * (now() - times[0])
            return [wall, wall, 0.0, 0.0]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            logits = network(images)
        loss = functional.cross_entropy(logits.float(), labels)
        times.append(now())
        loss.backward()
        times.append(now())
        optimizer.step()
        times.append(now())
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
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else memory("VmHWM"),
        "images_per_second": 1e3 * args.batch / wall,
        "steps_ms": [times[0] for times in steps],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
