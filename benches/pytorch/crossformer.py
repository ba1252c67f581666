"""CrossFormer and CrossFormer++ in plain eager PyTorch: what gridgrad is compared with.

Written the way such networks usually are: maps are reshaped and permuted into groups, and attention is composed of matrix
products, an addition and a softmax. What does not change between steps (offsets, indices into the bias table) is kept in
buffers. Parameters have the official names. Images are (batch, channels, height, width).

    python crossformer.py --check     # compares logits and gradients with tests/fixtures/crossformer
"""

import json
import struct
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

SIZES = {
    # embed_dim, depths, largest drop path rate
    "tiny": (64, (1, 1, 8, 6), 0.1),
    "small": (96, (2, 2, 6, 2), 0.2),
    "base": (96, (2, 2, 18, 2), 0.3),
    "large": (128, (2, 2, 18, 2), 0.5),
    "++small": (64, (2, 2, 18, 2), 0.2),
    "++base": (96, (2, 2, 18, 2), 0.3),
    "++large": (128, (2, 2, 18, 2), 0.5),
    "++huge": (128, (6, 6, 18, 2), 0.5),
}


def config(name: str, classes: int = 1000) -> dict:
    """The arguments of `CrossFormer` for a published size."""
    embed_dim, depths, drop_path_rate = SIZES[name]
    plus = name.startswith("++")
    return {
        "num_classes": classes,
        "embed_dim": embed_dim,
        "depths": depths,
        "num_heads": [embed_dim // 32 << stage for stage in range(4)],
        "group_size": [4, 4, 14, 7] if plus else [7, 7, 7, 7],
        "interval": [4, 2, 1, 1] if plus else [8, 4, 2, 1],
        "drop_path_rate": drop_path_rate,
        "use_acl": plus,
    }


class CrossScaleEmbedding(nn.Module):
    """Concentric convolutions of one stride, concatenated over channels."""

    def __init__(self, name: str, kernels: list[int], stride: int, channels: int, out: int):
        super().__init__()
        widths = [out >> min(index + 1, len(kernels) - 1) for index in range(len(kernels))]
        convolutions = [
            nn.Conv2d(channels, width, kernel, stride, (kernel - stride) // 2)
            for kernel, width in zip(kernels, widths)
        ]
        self.name = name
        setattr(self, name, nn.ModuleList(convolutions))

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, channels, height, width) to (batch, height / stride, width / stride, out)."""
        maps = [convolution(x) for convolution in getattr(self, self.name)]
        return torch.cat(maps, dim=1).permute(0, 2, 3, 1)


class PatchEmbedding(CrossScaleEmbedding):
    def __init__(self, kernels: list[int], stride: int, channels: int, out: int):
        super().__init__("projs", kernels, stride, channels, out)
        self.norm = nn.LayerNorm(out)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.embed(images))


class PatchMerging(CrossScaleEmbedding):
    def __init__(self, kernels: list[int], stride: int, channels: int):
        super().__init__("reductions", kernels, stride, channels, 2 * channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.embed(self.norm(x).permute(0, 3, 1, 2))


class DynamicPositionBias(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()

        def layer(out: int) -> nn.Sequential:
            return nn.Sequential(nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, out))

        self.pos_proj = nn.Linear(2, width)
        self.pos1, self.pos2, self.pos3 = layer(width), layer(width), layer(heads)

    def forward(self, offsets: torch.Tensor) -> torch.Tensor:
        return self.pos3(self.pos2(self.pos1(self.pos_proj(offsets))))


class Attention(nn.Module):
    """Attention within groups of `group` × `group` tokens."""

    def __init__(self, channels: int, heads: int, group: int):
        super().__init__()
        self.heads = heads
        self.pos = DynamicPositionBias(channels // 4 // 4, heads)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        steps = torch.arange(1 - group, group, dtype=torch.get_default_dtype())
        places = torch.cartesian_prod(torch.arange(group), torch.arange(group))
        apart = places[:, None] - places[None] + group - 1
        self.register_buffer("offsets", torch.cartesian_prod(steps, steps), persistent=False)
        self.register_buffer("index", (apart[..., 0] * (2 * group - 1) + apart[..., 1]).flatten(), persistent=False)

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`x` is (groups, tokens, channels), `mask`, added to the scores, (groups of an image, 1, 1, tokens)."""
        groups, tokens, channels = x.shape
        q, k, v = self.qkv(x).view(groups, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
        bias = self.pos(self.offsets)[self.index].view(tokens, tokens, self.heads)
        scores = scores + bias.permute(2, 0, 1)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask).flatten(0, 1)
        output = scores.softmax(dim=-1) @ v
        return self.proj(output.transpose(1, 2).reshape(groups, tokens, channels))


class Mlp(nn.Module):
    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(channels, hidden)
        self.fc2 = nn.Linear(hidden, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, map_size, channels, heads, group, interval, long, mlp_ratio, drop_path_rate, cooling):
        super().__init__()
        # A map that fits into a group is one group.
        if min(map_size) <= group:
            group, long = min(map_size), False
        self.group, self.interval = group, interval if long else 1
        self.drop_path_rate = drop_path_rate
        self.norm1 = nn.LayerNorm(channels)
        self.attn = Attention(channels, heads, group)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(channels * mlp_ratio))
        if cooling:
            self.ex_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            self.ex_ln = nn.LayerNorm(channels)
        self.cooling = cooling
        period = self.group * self.interval
        self.padding = [-extent % period for extent in map_size]
        mask = None
        if any(self.padding):
            padded = functional.pad(torch.zeros(1, *map_size, 1), self.pad_widths(), value=-1e6)
            mask = self.to_groups(padded).flatten(1)[:, None, None, :]
        self.register_buffer("mask", mask, persistent=False)

    def pad_widths(self) -> tuple:
        return (0, 0, 0, self.padding[1], 0, self.padding[0])

    def to_groups(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, height, width, channels) to (groups, tokens, channels)."""
        batch, height, width, channels = x.shape
        g, i = self.group, self.interval
        x = x.view(batch, height // (g * i), g, i, width // (g * i), g, i, channels)
        return x.permute(0, 1, 4, 3, 6, 2, 5, 7).reshape(-1, g * g, channels)

    def to_map(self, x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """The inverse of `to_groups`."""
        g, i = self.group, self.interval
        x = x.view(-1, height // (g * i), width // (g * i), i, i, g, g, x.shape[-1])
        return x.permute(0, 1, 5, 3, 2, 6, 4, 7).reshape(-1, height, width, x.shape[-1])

    def drop_path(self, branch: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path_rate == 0.0:
            return branch
        keep = 1.0 - self.drop_path_rate
        return branch * branch.new_empty(len(branch), 1, 1, 1).bernoulli_(keep).div_(keep)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        _, height, width, _ = x.shape
        y = self.norm1(x)
        if self.mask is not None:
            y = functional.pad(y, self.pad_widths())
        y = self.to_map(self.attn(self.to_groups(y), self.mask), *y.shape[1:3])
        if self.mask is not None:
            y = y[:, :height, :width]
        x = x + self.drop_path(y)
        x = x + self.drop_path(self.mlp(self.norm2(x)))
        if self.cooling:
            x = self.ex_ln(self.ex_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return x


class Stage(nn.Module):
    def __init__(self, blocks: list[Block], downsample: PatchMerging | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class CrossFormer(nn.Module):
    """The classifier for square images of `img_size` pixels."""

    def __init__(
        self,
        img_size=224,
        in_chans=3,
        num_classes=1000,
        embed_dim=96,
        depths=(2, 2, 6, 2),
        num_heads=(3, 6, 12, 24),
        group_size=(7, 7, 7, 7),
        interval=(8, 4, 2, 1),
        mlp_ratio=(4.0, 4.0, 4.0, 4.0),
        patch_kernels=(4, 8, 16, 32),
        patch_stride=4,
        merge_kernels=((2, 4), (2, 4), (2, 4)),
        merge_stride=2,
        drop_path_rate=0.0,
        use_acl=False,
    ):
        super().__init__()
        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        self.patch_embed = PatchEmbedding(patch_kernels, patch_stride, in_chans, embed_dim)
        self.layers = nn.ModuleList()
        side, channels = img_size // patch_stride, embed_dim
        for stage, depth in enumerate(depths):
            blocks = [
                Block(
                    (side, side),
                    channels,
                    num_heads[stage],
                    group_size[stage],
                    interval[stage],
                    long=block % 2 == 1,
                    mlp_ratio=mlp_ratio[stage],
                    drop_path_rate=rates.pop(0),
                    cooling=use_acl and (block + 1) % 3 == 0 and block + 1 < depth,
                )
                for block in range(depth)
            ]
            last = stage + 1 == len(depths)
            merging = None if last else PatchMerging(merge_kernels[stage], merge_stride, channels)
            self.layers.append(Stage(blocks, merging))
            if not last:
                side, channels = side // merge_stride, 2 * channels
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=(1, 2)))


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", content)
    dtypes = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64}
    tensors = {}
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            first, end = (8 + length + offset for offset in entry["data_offsets"])
            tensors[name] = torch.frombuffer(content[first:end], dtype=dtypes[entry["dtype"]]).view(entry["shape"])
    return tensors


def check() -> None:
    """Compares with values that the authors' code computed in f64 and stored in f32."""
    torch.set_default_dtype(torch.float64)
    folder = Path(__file__).parents[2] / "tests" / "fixtures" / "crossformer"
    arguments = json.loads((folder / "classifier.json").read_text())
    official_only = ("model", "kind", "qkv_bias", "layer_norm_eps", "adaptive_interval", "pad_type", "no_mask")
    arguments = {key: value for key, value in arguments.items() if key not in official_only}
    model = CrossFormer(**arguments | {"img_size": arguments["img_size"][0]})
    weights = read_safetensors(folder / "classifier.weights.safetensors")
    model.load_state_dict({name: value.double() for name, value in weights.items()})
    io = read_safetensors(folder / "classifier.io.safetensors")
    logits = model(io["input"].double())
    functional.cross_entropy(logits, io["target"]).backward()
    found = {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters()} | {"logits": logits}
    scale = max(io[name].abs().max().item() for name in found if name != "logits")
    worst = 0.0
    for name, value in found.items():
        difference = (value - io[name]).abs().max().item()
        # Some gradients are truly zero: the largest gradient sets their scale.
        allowed = 1e-6 * max(io[name].abs().max().item(), 0.1 * scale)
        worst = max(worst, difference / allowed)
        if difference > allowed:
            sys.exit(f"{name} differs by {difference:.1e}, allowed are {allowed:.1e}")
    print(f"logits and {len(found) - 1} gradients agree; the largest difference is {100 * worst:.0f} % of what is allowed")


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        sys.exit(__doc__)
    check()
