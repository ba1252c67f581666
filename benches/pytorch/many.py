"""Trains Network-in-Networks one after the other in eager PyTorch; the counterpart of examples/many_models.rs.

    python many.py pixels labels 28 4 50 5 --threads 2

Takes a file of pixels, a byte each, a file of labels, a byte each, the side of the images, and the numbers of models, of samples
of each, and of epochs. Model i has samples i n to (i + 1) n and seed i. Prints one line of JSON.
"""

import argparse
import json
import time
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch
from torch import nn
from torch.nn import functional

CLASSES, BATCH, PADDING = 10, 128, 4


class Layer(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


def network() -> nn.Module:
    """Section 7.1 of the published setting, as src/models/network_in_network.rs."""
    return nn.Sequential(
        *(Layer(1, 192, 5), Layer(192, 160, 1), Layer(160, 96, 1), nn.MaxPool2d(3, 2, 1)),
        *(Layer(96, 192, 5), Layer(192, 192, 1), Layer(192, 192, 1), nn.AvgPool2d(3, 2, 1)),
        *(Layer(192, 192, 3), Layer(192, 192, 1), Layer(192, 192, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, CLASSES)),
    )


def crops(images: torch.Tensor) -> torch.Tensor:
    """Each image shifted at random, with black pixels around it."""
    side, count = images.shape[-1], len(images)
    padded = functional.pad(images, (PADDING,) * 4)
    offsets = torch.randint(2 * PADDING + 1, (count, 2)).tolist()
    return torch.stack([image[:, y : y + side, x : x + side] for image, (y, x) in zip(padded, offsets)])


def train(images: torch.Tensor, labels: torch.Tensor, epochs: int, seed: int) -> float:
    torch.manual_seed(seed)
    model = network().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    marks = [mark * epochs // 200 for mark in (60, 120, 160)]
    mean, deviation = images.mean(), images.std()
    loss = torch.zeros(())
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.2 ** sum(epoch > mark for mark in marks)
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad(set_to_none=True)
            loss = functional.cross_entropy(model((crops(images[batch]) - mean) / deviation), labels[batch])
            loss.backward()
            optimizer.step()
    return loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pixels", type=Path)
    parser.add_argument("labels", type=Path)
    for name in ("side", "models", "samples", "epochs"):
        parser.add_argument(name, type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pixels = torch.frombuffer(bytearray(args.pixels.read_bytes()), dtype=torch.uint8)
    images = pixels.reshape(-1, 1, args.side, args.side).float() / 255
    labels = torch.frombuffer(bytearray(args.labels.read_bytes()), dtype=torch.uint8).long()
    start = time.perf_counter()
    losses = []
    for model in range(args.models):
        own = slice(model * args.samples, (model + 1) * args.samples)
        losses.append(train(images[own], labels[own], args.epochs, seed=model))
    print(json.dumps({"torch": torch.__version__, "wall_s": time.perf_counter() - start, "losses": losses}))


if __name__ == "__main__":
    main()
