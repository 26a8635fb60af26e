"""Train a ternary network on real data, compile it, and compare it with its float twin.

    python examples/digits.py

An MLP of bitcompile.nn.BitLinear layers learns scikit-learn's 1,797 handwritten digits in seconds,
beside the same network of float layers. The compiled artifact gives torch's answers.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

import bitcompile
from bitcompile.nn import BitLinear

WIDTH, BATCH, RATE = 256, 64, 2e-3


@dataclass(frozen=True)
class Data:
    """Pixels float32 ``[samples, 64]`` in 0..1 and labels int64 ``[samples]``."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


@dataclass(frozen=True)
class Result:
    """Accuracies on the test set, and answers of torch and of the artifact that differ."""

    float_accuracy: float
    ternary_accuracy: float
    artifact_accuracy: float
    different: int


def digits() -> Data:
    """scikit-learn's digits, a quarter of them for the test."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    parts = train_test_split(pixels, labels, test_size=0.25, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, parts)
    return Data(train_x, train_y, test_x, test_y)


def ternary_network() -> nn.Module:
    """Every layer ternary; a norm before each keeps activations in int8's range."""
    return nn.Sequential(
        BitLinear(64, WIDTH, norm="rms"),
        nn.ReLU(),
        BitLinear(WIDTH, WIDTH, norm="rms"),
        nn.ReLU(),
        BitLinear(WIDTH, 10, norm="rms"),
    )


def float_network() -> nn.Module:
    """The same with float weights."""
    return nn.Sequential(
        nn.RMSNorm(64, eps=1e-6),
        nn.Linear(64, WIDTH),
        nn.ReLU(),
        nn.RMSNorm(WIDTH, eps=1e-6),
        nn.Linear(WIDTH, WIDTH),
        nn.ReLU(),
        nn.RMSNorm(WIDTH, eps=1e-6),
        nn.Linear(WIDTH, 10),
    )


def train(network: nn.Module, data: Data, epochs: int) -> None:
    """Adam with a rate that falls to zero, as ternary weights like it."""
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data.train_x)).split(BATCH):
            loss = functional.cross_entropy(network(data.train_x[rows]), data.train_y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    network.eval()


@torch.no_grad()
def predict(network: nn.Module, data: Data) -> torch.Tensor:
    """The digit of each test sample."""
    return network(data.test_x).argmax(1)


def run(out: Path, epochs: int = 20, seed: int = 0) -> Result:
    """Train both networks, build the ternary one into ``out``, run it in onnxruntime."""
    data = digits()
    accuracies, answers = [], None
    for make in (float_network, ternary_network):
        torch.manual_seed(seed)
        network = make()
        train(network, data, epochs)
        answers = predict(network, data)
        accuracies.append((answers == data.test_y).float().mean().item())

    bitcompile.build(network, example_inputs=data.test_x[:1], out=out, force=True)
    session = bitcompile.load(out)
    name = session.get_inputs()[0].name
    compiled = session.run(None, {name: data.test_x.numpy()})[0].argmax(1)
    return Result(
        *accuracies,
        float((compiled == data.test_y.numpy()).mean()),
        int((compiled != answers.numpy()).sum()),
    )


def main(arguments: list[str] | None = None) -> Result:
    """Run it and print the accuracies."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where the artifact goes [default: nowhere]")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        result = run(options.out or Path(folder) / "digits", options.epochs)
    print(f"float network      {result.float_accuracy:.2%}")
    print(f"ternary, in torch  {result.ternary_accuracy:.2%}")
    print(f"ternary, artifact  {result.artifact_accuracy:.2%}")
    print(f"answers that differ between torch and artifact: {result.different}")
    return result


if __name__ == "__main__":
    main()
