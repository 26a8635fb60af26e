"""A small vision transformer with ternary projections, trained, compiled, run at any batch size.

    python examples/encoder.py

It reads an 8 x 8 digit as 16 patches of 2 x 2 pixels. bitcompile.nn.quantize_ makes the projections
of an ordinary torch model ternary; patch embedding and classifier stay float.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from digits import digits
from torch import nn
from torch.nn import functional

import bitcompile
from bitcompile.nn import quantize_

WIDTH, HEADS, HIDDEN, LAYERS, PATCHES = 64, 4, 128, 2, 16


class Block(nn.Module):
    """Attention and a feed-forward network, each after a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[batch, patches, WIDTH]`` to the same."""
        B, S, _ = x.shape
        heads = self.qkv(self.norm1(x)).reshape(B, S, 3, HEADS, WIDTH // HEADS)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, S, WIDTH))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Pixels ``[batch, 8, 8]`` to scores ``[batch, 10]``."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Linear(4, WIDTH)
        self.position = nn.Parameter(torch.randn(PATCHES, WIDTH) * 0.02)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.classifier = nn.Linear(WIDTH, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """See the class."""
        B = pixels.shape[0]
        patches = pixels.reshape(B, 4, 2, 4, 2).transpose(2, 3).reshape(B, PATCHES, 4)
        x = self.patch(patches) + self.position
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x).mean(1))


@dataclass(frozen=True)
class Result:
    """Accuracy of the artifact on the test set, and answers of torch that it does not share."""

    accuracy: float
    different: int
    ternary_layers: int


def train(model: nn.Module, x: torch.Tensor, y: torch.Tensor, epochs: int) -> None:
    """Adam with one rise and fall of the rate."""
    steps = epochs * -(-len(x) // 64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            loss = functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def run(out: Path, epochs: int = 12) -> Result:
    """Train, build into ``out``, and ask torch and onnxruntime the same."""
    torch.manual_seed(0)
    data = digits()
    model = Encoder()
    replaced = quantize_(model, lambda name, _: name.startswith("blocks."))
    train(model, data.train_x.reshape(-1, 8, 8), data.train_y, epochs)

    images = data.test_x.reshape(-1, 8, 8)
    bitcompile.build(model, example_inputs=images[:1], out=out, force=True)
    session = bitcompile.load(out)
    compiled = [  # batches of 1, 7 and the rest: the same artifact takes any
        session.run(["output"], {"pixels": part.numpy()})[0].argmax(1)
        for part in images.split([1, 7, len(images) - 8])
    ]
    answers = np.concatenate(compiled)
    with torch.no_grad():
        expected = model.eval()(images).argmax(1).numpy()
    accuracy = float((answers == data.test_y.numpy()).mean())
    return Result(accuracy, int((answers != expected).sum()), replaced)


def main(arguments: list[str] | None = None) -> Result:
    """Run it and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the artifact goes [default: nowhere]")
    parser.add_argument("--epochs", type=int, default=12)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.out or Path(folder) / "encoder", options.epochs)
    print(f"ternary layers        {result.ternary_layers}")
    print(f"accuracy of artifact  {result.accuracy:.2%}")
    print(f"answers that differ between torch and artifact: {result.different}")
    return result


if __name__ == "__main__":
    main()
