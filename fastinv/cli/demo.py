"""Train a small target, attack it, and draw what comes out: three minutes, no download."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastinv.cli.arguments import integer, shows_progress
from fastinv.data import PHOTOGRAPHS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser)
    parser.add_argument("--split", help="the split point; left out: ReLU22 of cifar_net, ReLU2 of lenet5")
    parser.add_argument("--seed", type=integer, default=0, help="the same seed, the same result")
    parser.add_argument("--out", type=Path, default=Path("fastinv-demo"), help="folder for the results")


def add_data_argument(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    parser.add_argument(
        "--data",
        required=required,
        default=None if required else PHOTOGRAPHS,
        help="a folder with MNIST (IDX), CIFAR-10 (binary batches or Parquet) or images by class; photographs: crops "
        "of those that scikit-image ships",
    )


def run(args: argparse.Namespace) -> None:
    from fastinv import demo

    demo.run(demo.Demo(args.data, args.split, args.seed, args.out, progress=shows_progress()))
