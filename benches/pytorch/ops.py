"""Times single ops in PyTorch on the processor; the counterpart of `gridgrad bench ops`.

Reads requests from the standard input, a line of JSON each: `{"op": …, "mode": …}` with a line of `gridgrad bench ops --list` as
the op and one of MODES. Answers each with a line of JSON: medians of a forward pass and of a forward with a backward pass, in
milliseconds, or `{"error": …}`. Runs in the environment that install.py makes.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from torch.nn import functional

import crossformer

MODES = ("eager", "channels-last", "compiled")


def image(spec: dict, channels: int) -> torch.Tensor:
    return torch.randn(spec["batch"], channels, spec["side"], spec["side"])


def attention(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    batch, side, heads, width, group = (spec[key] for key in ("batch", "side", "heads", "head_width", "group"))
    table = torch.randn((2 * group - 1) ** 2, heads)
    offsets = torch.stack(torch.meshgrid(torch.arange(group), torch.arange(group), indexing="ij")).flatten(1)
    rows = offsets[:, :, None] - offsets[:, None, :] + group - 1
    rows = rows[0] * (2 * group - 1) + rows[1]
    local, strided = group, side // group
    # Axes of a map cut into groups, and where a group's tokens lie in them.
    short = spec["interval"] == 1

    def run(qkv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        if short:
            cut = qkv.view(batch, strided, local, strided, local, -1).permute(0, 1, 3, 2, 4, 5)
        else:
            cut = qkv.view(batch, local, strided, local, strided, -1).permute(0, 2, 4, 1, 3, 5)
        cut = cut.reshape(-1, group * group, 3, heads, width).permute(2, 0, 3, 1, 4)
        bias = table[rows.flatten()].view(group**2, group**2, heads).permute(2, 0, 1)
        scores = (cut[0] * width**-0.5) @ cut[1].transpose(-2, -1) + bias
        mixed = (scores.softmax(-1) @ cut[2]).transpose(1, 2).reshape(batch, strided, strided, group, group, -1)
        order = (0, 1, 3, 2, 4, 5) if short else (0, 3, 1, 4, 2, 5)
        return mixed.permute(*order).reshape(batch, side, side, -1)

    return [torch.randn(batch, side, side, 3 * heads * width), table], run


def embedding(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    stride, kernels = spec["stride"], spec["kernels"]
    weights = [torch.randn(out, spec["channels"], side, side) for side, out in kernels]
    biases = [torch.randn(out) for _, out in kernels]

    def run(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        pairs = zip(parameters, parameters[len(kernels) :], kernels)
        return torch.cat([functional.conv2d(x, w, b, stride, (k - stride) // 2) for w, b, (k, _) in pairs], 1)

    return [image(spec, spec["channels"]), *weights, *biases], run


def position_bias(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    group, width = spec["group"], spec["width"]
    axis = torch.arange(1 - group, group).float()
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).view(-1, 2)
    parameters = [torch.randn(width, 2), torch.randn(width)]
    for out in (width, width, spec["heads"]):
        parameters += [torch.randn(width), torch.randn(width), torch.randn(out, width), torch.randn(out)]

    def run(*p: torch.Tensor) -> torch.Tensor:
        x = functional.linear(grid, p[0], p[1])
        for first in (2, 6, 10):
            x = functional.layer_norm(x, (width,), p[first], p[first + 1]).relu()
            x = functional.linear(x, p[first + 2], p[first + 3])
        return x

    return parameters, run


def convolution(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    (inputs, outputs), kernel = spec["channels"], spec["kernel"]
    weight = torch.randn(outputs, inputs, kernel, kernel)
    return [image(spec, inputs), weight], lambda x, w: functional.conv2d(x, w, None, spec["stride"], kernel // 2)


def linear(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    tensors = [torch.randn(spec["rows"], spec["inputs"]), torch.randn(spec["outputs"], spec["inputs"])]
    if spec["gelu"]:
        return [*tensors, torch.randn(spec["outputs"])], lambda x, w, b: functional.gelu(functional.linear(x, w, b))
    return [*tensors, torch.randn(spec["outputs"])], functional.linear


def batch_norm(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    channels = spec["channels"]
    tensors = [image(spec, channels), torch.randn(channels), torch.randn(channels)]
    return tensors, lambda x, w, b: functional.batch_norm(x, None, None, w, b, training=True)


def drop_path(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    def run(x: torch.Tensor) -> torch.Tensor:
        return x * (torch.rand(len(x), 1) >= 0.1) / 0.9

    return [torch.randn(spec["batch"], spec["elements"])], run


def cross_entropy(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    labels = torch.randint(spec["classes"], (spec["rows"],))
    return [torch.randn(spec["rows"], spec["classes"])], lambda x: functional.cross_entropy(x, labels)


def layer_norm(spec: dict) -> tuple[list[torch.Tensor], Callable]:
    rows, channels = spec["rows"], spec["channels"]
    tensors = [torch.randn(rows, channels), torch.randn(channels), torch.randn(channels)]
    return tensors, lambda x, w, b: functional.layer_norm(x, (channels,), w, b)


def pool(spec: dict, function: Callable) -> tuple[list[torch.Tensor], Callable]:
    return [image(spec, spec["channels"])], lambda x: function(x, spec["kernel"], spec["stride"], spec["padding"])


OPS = {
    "linear": linear,
    "lsda": attention,
    "cross_scale_embedding": embedding,
    "position_bias": position_bias,
    "layer_norm": layer_norm,
    "softmax": lambda spec: ([torch.randn(spec["rows"], spec["columns"])], lambda x: x.softmax(-1)),
    "gelu": lambda spec: ([torch.randn(spec["elements"])], functional.gelu),
    "relu": lambda spec: ([torch.randn(spec["elements"])], functional.relu),
    "add": lambda spec: ([torch.randn(spec["elements"]), torch.randn(spec["elements"])], torch.add),
    "dropout": lambda spec: ([torch.randn(spec["elements"])], lambda x: functional.dropout(x, 0.1)),
    "drop_path": drop_path,
    "conv2d": convolution,
    "batch_norm": batch_norm,
    "max_pool": lambda spec: pool(spec, functional.max_pool2d),
    "avg_pool": lambda spec: pool(spec, functional.avg_pool2d),
    "global_avg_pool": lambda spec: ([image(spec, spec["channels"])], lambda x: x.mean((2, 3))),
    "cross_entropy": cross_entropy,
}


def repeat(call: Callable, seconds: float) -> float:
    """The median of calls, in milliseconds: until `seconds` are over, at least three times after a first one."""
    call()
    times, start = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def measure(spec: dict, mode: str, seconds: float) -> dict:
    torch.manual_seed(0)
    tensors, run = OPS[spec["op"]](spec)
    if mode == "channels-last":
        if not any(tensor.dim() == 4 for tensor in tensors) or spec["op"] == "lsda":
            return {"error": "no map of this op has another layout"}
        tensors = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in tensors]
    elif mode == "compiled":
        run = torch.compile(run)
    with torch.no_grad():
        forward = repeat(lambda: run(*tensors), seconds)
    variables = [t.requires_grad_(not (spec["image"] and number == 0)) for number, t in enumerate(tensors)]
    wanted = [t for t in variables if t.requires_grad]
    gradient = torch.randn_like(run(*variables))
    both = repeat(lambda: torch.autograd.grad(run(*variables), wanted, gradient), seconds)
    return {"forward_ms": forward, "both_ms": both}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--milliseconds", type=int, default=300, help="for each op, mode and direction")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = measure(request["op"], request["mode"], args.milliseconds / 1e3)
        except Exception as error:  # a mode that cannot run an op is told, and the others go on
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
