"""Times PyTorch on the problems of `cargo bench --bench gpu`.

Reads problems as a JSON list from standard input and prints measurements as one, in the rows of the harness's table. The
harness runs it itself:

    cargo bench --features cuda,cudnn --bench gpu -- --pytorch python3
    cargo bench --bench gpu -- --device cpu --short --quick --pytorch python3

For attention: the partition into groups, then scaled_dot_product_attention under each of its backends with the bias as a mask,
the same compiled, and FlexAttention with the bias as a score modification. For the embedding: separate convolutions, eager and
compiled. For the position bias: the networks of a stage one after the other, eager and compiled, in float32 with tables in the
dtype, as the harness has them. For the rest: the library's op. On a GPU times are between events on its stream, elsewhere the
host's; inputs rotate among copies that are together larger than the second-level cache.
"""

import argparse
import json
import statistics
import sys
import time
import warnings

warnings.filterwarnings("ignore")

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

ROTATED_BYTES = 128 << 20
MOST_COPIES = 128
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


class Attention:
    """Grouped attention of a map (batch, height, width, 3 heads d), with a bias table (rows, heads)."""

    def __init__(self, problem: dict, device: torch.device):
        (self.height, self.width), (self.gh, self.gw), (self.ih, self.iw) = (
            problem[key] for key in ("map", "group", "interval")
        )
        self.heads, self.d = problem["heads"], problem["head_width"]
        if self.height % (self.gh * self.ih) or self.width % (self.gw * self.iw):
            raise NotImplementedError("the partition is written for maps without padding")
        places = torch.cartesian_prod(torch.arange(self.gh), torch.arange(self.gw))
        apart = places[:, None] - places[None] + torch.tensor([self.gh - 1, self.gw - 1])
        self.index = (apart[..., 0] * (2 * self.gw - 1) + apart[..., 1]).to(device)

    def partition(self, qkv: torch.Tensor) -> torch.Tensor:
        """(3, groups, heads, tokens, d)"""
        x = qkv.view(-1, self.height // (self.gh * self.ih), self.gh, self.ih,
                     self.width // (self.gw * self.iw), self.gw, self.iw, qkv.shape[-1])  # fmt: skip
        x = x.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, self.gh * self.gw, 3, self.heads, self.d)
        return x.permute(2, 0, 3, 1, 4)

    def to_map(self, x: torch.Tensor) -> torch.Tensor:
        x = x.transpose(1, 2).reshape(-1, self.height // (self.gh * self.ih), self.width // (self.gw * self.iw),
                                      self.ih, self.iw, self.gh, self.gw, self.heads * self.d)  # fmt: skip
        return x.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(-1, self.height, self.width, self.heads * self.d)

    def sdpa(self, qkv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        q, k, v = self.partition(qkv)
        bias = table[self.index].permute(2, 0, 1)[None]
        return self.to_map(functional.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(len(q), -1, -1, -1)))

    def without_bias(self, qkv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """What flash attention, which takes no mask, can do of it."""
        return self.to_map(functional.scaled_dot_product_attention(*self.partition(qkv)))

    def flex(self, qkv: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        index = self.index

        def add_bias(score, batch, head, query, key):
            return score + table[index[query, key], head]

        q, k, v = (part.contiguous() for part in self.partition(qkv))
        return self.to_map(flex_attention(q, k, v, score_mod=add_bias))


def with_backend(function, backend):
    def run(*inputs):
        with sdpa_kernel(backend):
            return function(*inputs)

    return run


def position_bias(offsets, weight, bias, *layers):
    hidden = functional.linear(offsets, weight, bias)
    for at in range(0, 12, 4):
        scale, shift, weight, bias = layers[at : at + 4]
        hidden = functional.layer_norm(hidden, scale.shape, scale, shift).relu()
        hidden = functional.linear(hidden, weight, bias)
    return hidden


def position_biases(offsets: list, dtype: torch.dtype):
    """A function of 14 parameters for each network."""

    def run(*inputs):
        networks = (inputs[at : at + 14] for at in range(0, len(inputs), 14))
        return tuple(position_bias(rows, *network).to(dtype) for rows, network in zip(offsets, networks))

    return run


def implementations(problem: dict, device: torch.device, dtype: torch.dtype):
    """(shapes of the inputs, number of those that need no gradient, {name: function})"""
    op, batch = problem["op"], problem["batch"]
    if op == "lsda":
        attention = Attention(problem, device)
        rows = (2 * attention.gh - 1) * (2 * attention.gw - 1)
        functions = {f"PyTorch SDPA {name}": with_backend(attention.sdpa, backend) for name, backend in BACKENDS.items()}
        functions["PyTorch SDPA flash, no bias"] = with_backend(attention.without_bias, BACKENDS["flash"])
        functions["PyTorch SDPA compiled"] = torch.compile(attention.sdpa)
        functions["PyTorch FlexAttention"] = torch.compile(attention.flex)
        channels = 3 * attention.heads * attention.d
        return [(batch, attention.height, attention.width, channels), (rows, attention.heads)], 0, functions
    if op == "cross_scale_embedding":
        (height, width), sides, out, stride = (problem[key] for key in ("map", "sides", "out", "stride"))
        channels = problem["channels"]

        def embed(x, *parameters):
            weights, biases = parameters[: len(sides)], parameters[len(sides) :]
            maps = [
                functional.conv2d(x.permute(0, 3, 1, 2), weight, bias, stride, (side - stride) // 2)
                for weight, bias, side in zip(weights, biases, sides)
            ]
            return torch.cat(maps, 1).permute(0, 2, 3, 1)

        shapes = [(batch, height, width, channels)]
        shapes += [(o, channels, side, side) for side, o in zip(sides, out)] + [(o,) for o in out]
        return shapes, int(problem["image"]), both("convolutions", embed)
    if op == "position_bias":
        groups, width, heads = problem["groups"], problem["width"], problem["heads"]
        grids = [(torch.arange(1 - gh, gh), torch.arange(1 - gw, gw)) for gh, gw in groups]
        offsets = [torch.cartesian_prod(*grid).to(device, torch.float32) for grid in grids]
        shapes = [(width, 2), (width,)]
        for out in (width, width, heads):
            shapes += [(width,), (width,), (out, width), (out,)]
        return shapes * len(groups), 0, both("layers", position_biases(offsets, dtype))
    if op == "layer_norm":
        width = problem["width"]
        shapes = [(batch * problem["rows"], width), (width,), (width,)]
        return shapes, 0, both("layer_norm", lambda x, w, b: functional.layer_norm(x, w.shape, w, b))
    if op == "linear_gelu":
        rows, inputs, outputs = problem["rows"], problem["input"], problem["output"]
        shapes = [(batch * rows, inputs), (outputs, inputs), (outputs,)]
        return shapes, 0, both("linear, gelu", lambda x, w, b: functional.gelu(functional.linear(x, w, b)))
    if op == "softmax":
        return [(batch * problem["rows"], problem["width"])], 0, both("softmax", lambda x: x.softmax(-1))
    (height, width), channels = problem["map"], problem["channels"]
    if op == "max_pool":
        pool = lambda x: functional.max_pool2d(x.permute(0, 3, 1, 2), 3, 2, 1).permute(0, 2, 3, 1)
        return [(batch, height, width, channels)], 0, both("max_pool2d", pool)
    norm = lambda x, w, b: functional.batch_norm(x.permute(0, 3, 1, 2), None, None, w, b, True).permute(0, 2, 3, 1)
    return [(batch, height, width, channels), (channels,), (channels,)], 0, both("batch_norm", norm)


def both(name: str, function) -> dict:
    return {f"PyTorch {name}": function, f"PyTorch {name} compiled": torch.compile(function)}


def bench(function, shapes, constants: int, backward: bool, device: torch.device, dtype: torch.dtype):
    """A function of the number of the copy."""
    elements = sum(torch.Size(shape).numel() for shape in shapes)
    copies = 2
    if device.type == "cuda":
        copies = max(1, min(MOST_COPIES, -(-ROTATED_BYTES // (elements * dtype.itemsize))))
    sets = [[torch.randn(shape, device=device, dtype=dtype) for shape in shapes] for _ in range(copies)]
    if not backward:

        def forward(copy):
            with torch.no_grad():
                function(*sets[copy % copies])

        return forward
    for inputs in sets:
        for tensor in inputs[constants:]:
            tensor.requires_grad_()
    outputs = [function(*inputs) for inputs in sets]
    outputs = [output if isinstance(output, tuple) else (output,) for output in outputs]
    grads = [tuple(torch.randn_like(part) for part in output) for output in outputs]

    def run(copy):
        copy %= copies
        torch.autograd.grad(outputs[copy], sets[copy][constants:], grads[copy], retain_graph=True, allow_unused=True)

    return run


def elapsed(run, first: int, calls: int, device: torch.device) -> float:
    """Seconds of a call."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for copy in range(first, first + calls):
            run(copy)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / calls
    start = time.perf_counter()
    for copy in range(first, first + calls):
        run(copy)
    return (time.perf_counter() - start) / calls


def samples(run, device: torch.device, warm_up: float, measured: float, count: int) -> list:
    run(0)
    first, calls, begin = 1, 1, time.perf_counter()
    estimate = elapsed(run, first, 1, device)
    while time.perf_counter() - begin < warm_up:
        estimate = elapsed(run, first, calls, device)
        first += calls
        calls = min(2 * calls, 1 << 12)
    calls = max(1, int(measured / count / max(estimate, 1e-7)))
    times = []
    for _ in range(count):
        times.append(elapsed(run, first, calls, device))
        first += calls
    return sorted(times)


def measure(problem: dict, args: argparse.Namespace, device: torch.device, dtype: torch.dtype) -> list:
    rows = []
    try:
        shapes, constants, functions = implementations(problem, device, dtype)
    except NotImplementedError as reason:
        return [row(problem, direction, "PyTorch", None, str(reason)) for direction in ("forward", "backward")]
    for name, function in functions.items():
        for direction in ("forward", "backward"):
            if device.type != "cuda" and (name.endswith("compiled") or "Flex" in name):
                rows.append(row(problem, direction, name, None, "compiled for GPUs alone"))
                continue
            try:
                torch.compiler.reset()
                stored = torch.float32 if problem["op"] == "position_bias" else dtype
                run = bench(function, shapes, constants, direction == "backward", device, stored)
                budget = (0.01, 0.05, 5) if args.short else (0.3, 1.0, 30)
                rows.append(row(problem, direction, name, samples(run, device, *budget), None))
            except Exception as error:  # A backend that does not take the problem says so in many types.
                rows.append(row(problem, direction, name, None, str(error).strip().splitlines()[:1] or [repr(error)]))
    return rows


def row(problem: dict, direction: str, name: str, times: list, skipped) -> dict:
    if isinstance(skipped, list):
        skipped = skipped[0]
    quarter = lambda share: times[round((len(times) - 1) * share)]
    return {
        "problem": problem["problem"],
        "models": problem["models"],
        "batch": problem["batch"],
        "direction": direction,
        "implementation": name,
        "median": statistics.median(times) if times else None,
        "quartiles": [quarter(0.25), quarter(0.75)] if times else None,
        "skipped": skipped,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--short", action="store_true", help="few and short samples")
    args = parser.parse_args()
    device = torch.device(args.device)
    # The factors of f32 products are not rounded to TF32, as gridgrad's are not.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    rows = [row for problem in json.load(sys.stdin) for row in measure(problem, args, device, DTYPES[args.dtype])]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
