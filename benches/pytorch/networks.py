"""ResNet-18 with the stem for small images, Network-in-Network, and a transformer block, in plain PyTorch: what gridgrad is
compared with.

ResNet's parameters have torchvision's names. Images are (batch, channels, height, width), a block's maps (batch, height, width,
channels).
"""

import torch
from torch import nn
from torch.nn import functional

import crossformer


class BasicBlock(nn.Module):
    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return functional.relu(y + shortcut, inplace=True)


class ResNet18(nn.Module):
    def __init__(self, classes: int = 10, channels: int = 3):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        inputs = 64
        for number, width in enumerate([64, 128, 256, 512], start=1):
            first = BasicBlock(inputs, width, 1 if number == 1 else 2)
            setattr(self, f"layer{number}", nn.Sequential(first, BasicBlock(width, width, 1)))
            inputs = width
        self.fc = nn.Linear(512, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        for number in range(1, 5):
            x = getattr(self, f"layer{number}")(x)
        return self.fc(x.mean((2, 3)))


def conv_norm_relu(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


class NetworkInNetwork(nn.Sequential):
    def __init__(self, classes: int = 10, channels: int = 1):
        super().__init__(
            *conv_norm_relu(channels, 192, 5),
            *conv_norm_relu(192, 160, 1),
            *conv_norm_relu(160, 96, 1),
            nn.MaxPool2d(3, 2, 1),
            *conv_norm_relu(96, 192, 5),
            *conv_norm_relu(192, 192, 1),
            *conv_norm_relu(192, 192, 1),
            nn.AvgPool2d(3, 2, 1),
            *conv_norm_relu(192, 192, 3),
            *conv_norm_relu(192, 192, 1),
            *conv_norm_relu(192, 192, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(192, classes),
        )


class TransformerBlock(nn.Module):
    """A first block of CrossFormer-S for maps of `side` × `side` tokens, and a classifier on the mean of its tokens."""

    CHANNELS = 96

    def __init__(self, side: int, classes: int = 10):
        super().__init__()
        size, channels = (side, side), self.CHANNELS
        self.block = crossformer.Block(size, channels, 3, 7, 8, False, 4.0, 0.0, False)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.block(x).mean((1, 2)))
