"""Attack a model of your own wherever it can be cut, and report what is recovered.

The model is code of yours: --model net.py:build names a function without arguments that makes it, or the model itself.
The attacker has the training images of --data; test images are what he recovers. --list shows where the model
can be cut. The same command goes on where it was interrupted; more split points or attacks come into the same report.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinv.auditing.attacks import ATTACKS, SHADOWS
from fastinv.cli.arguments import (
    add_training_arguments,
    integer,
    numbers,
    plural,
    positive,
    shows_progress,
    table,
    threads,
)
from fastinv.cli.demo import add_data_argument
from fastinv.data import PHOTOGRAPHS, load, photographs
from fastinv.errors import DataError, TrainingError
from fastinv.experiment.recipe import STEPS

if TYPE_CHECKING:
    from torch import nn

    from fastinv.auditing.points import Point
    from fastinv.auditing.runner import AuditReport
    from fastinv.data import Dataset

GIVEN = ("attacks", "kind", "width", "depth", "epochs", "shadow_epochs", "optimizer", "precision", "device", "threads")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", metavar="FILE.py:NAME", required=True, help="or PACKAGE.MODULE:NAME; its code is run"
    )
    parser.add_argument("--weights", metavar="FILE", type=Path, help="the model's: .safetensors, or a saved state dict")
    parser.add_argument(
        "--protect",
        metavar="FILE.py:NAME",
        help="what is done to features before they are sent: a function of a tensor [n, ...] that gives another",
    )
    add_data_argument(parser, required=True)
    parser.add_argument(
        "--size", nargs=2, type=positive, metavar=("H", "W"), help="to which images in folders by class are resized"
    )
    parser.add_argument(
        "--mean", type=numbers, default=0.0, help="of the model's input normalisation, as in .485,.456,.406"
    )
    parser.add_argument("--std", type=numbers, default=1.0, help="likewise")
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", type=Path, default=Path("fastinv-audit"), help="for the results"
    )
    parser.add_argument("--list", action="store_true", help="show where the model can be cut, and attack nothing")
    parser.add_argument("--splits", nargs="+", metavar="LAYER", help="where to cut it; left out: wherever it can be")
    parser.add_argument(
        "--attacks",
        nargs="+",
        choices=ATTACKS,
        help="rmle: white-box; inverse_network: black-box, also from noise alone; refined: white-box, rMLE from what "
        "the inverse network gives; fit_shadow: black-box, shadow: query-free, both of a --model that makes it and "
        "--weights; left out: the first three",
    )
    parser.add_argument("--images", type=positive, help="how many the attacker has, at most; left out: all to train on")
    parser.add_argument("--scored", type=positive, default=200, help="test images that he recovers")
    parser.add_argument("--kind", choices=("paper", "residual"), help="of inverse networks; left out: paper")
    parser.add_argument("--width", type=positive, help="fewest channels of inverse networks; left out: 64")
    parser.add_argument("--depth", type=positive, help="blocks of residual inverse networks; left out: 4")
    parser.add_argument("--epochs", type=integer, help="of inverse networks; left out: 10")
    parser.add_argument("--shadow-epochs", type=integer, help="of shadows; left out: 10")
    parser.add_argument("--optimizer", choices=STEPS, help="of rMLE; left out: lbfgs")
    parser.add_argument("--seed", type=integer, default=0, help="the same seed, the same result")
    parser.add_argument("--threads", type=threads, help="threads to use; all cores where left out")
    add_training_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    import fastinv
    from fastinv.model_files import load_function, load_model
    from fastinv.training import seeded

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    train, test = _data(args)
    train, test = train.sample(args.images, args.seed), test.sample(args.scored, args.seed)
    with seeded(args.seed):  # of a model without weights
        model, untrained = load_model(args.model, args.weights)
    shadows = [attack for attack in args.attacks or () if attack in SHADOWS]
    if shadows and untrained is None:
        raise TrainingError(f"{shadows[0]} starts from what --model makes: pass --weights of the trained model")
    if args.list:
        _list(model, args, train.image_shape)
        return 0
    options: dict[str, Any] = {name: getattr(args, name) for name in GIVEN if getattr(args, name) is not None}
    report = fastinv.audit(
        model,
        train.images,
        test.images,
        args.out,
        at=args.splits,
        mean=args.mean,
        std=args.std,
        labels=train.labels,
        truth_labels=test.labels,
        untrained=untrained,
        protect=None if args.protect is None else load_function(args.protect),
        seed=args.seed,
        progress=shows_progress(),
        tell=_tell,
        **options,
    )
    print(_summary(report))
    print(f"{report.path}: {plural(len(report.results), 'experiment')}, {report.ran:,} of them run now")
    if report.failed:
        print(f"{plural(len(report.failed), 'experiment')} failed; the same command tries them again")
    return 3 if report.failed else 0


def _data(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    if args.data == PHOTOGRAPHS:
        if args.size is not None:
            raise DataError("--size is for images in folders by class; leave it out")
        return photographs(args.seed)
    return load(args.data, size=None if args.size is None else tuple(args.size), seed=args.seed)


def _tell(line: str) -> None:
    print(line, flush=True)


def _list(model: nn.Module, args: argparse.Namespace, image_shape: tuple[int, ...]) -> None:
    """What crosses at each split point."""
    from fastinv.auditing.points import Cuts

    cuts = Cuts.of(model, args.mean, args.std, None, image_shape, named=args.splits is not None)
    rows = [_columns(cuts.point(name, image_shape)) for name in args.splits or cuts.names]
    print(table(["cut after", "features", "KiB in float32", "MFLOP of the edge"], rows))


def _summary(report: AuditReport) -> str:
    """The strongest attack at each split point."""
    rows = []
    for point in report.points:
        attack = report.strongest[point.at]
        best = report.results[point.at, attack]
        scores = [f"{best.psnr:.2f}", f"{best.ssim:.3f}", f"{best.recognisable:.0%}"]
        right = "-" if point.accuracy is None else f"{point.accuracy:.1%}"
        rows.append([*_columns(point), right, attack, *scores])
    header = ["cut after", "features", "KiB in float32", "MFLOP of the edge", "right classes", "strongest attack"]
    psnr, ssim = report.nothing
    return (
        table([*header, "PSNR", "SSIM", "recognisable"], rows)
        + f"\nwithout any features: PSNR {psnr:.2f} dB, SSIM {ssim:.3f}"
    )


def _columns(point: Point) -> list[str]:
    shape = "×".join(map(str, point.feature_shape))
    return [point.at, shape, f"{point.kibibytes:,.1f}", "-" if point.flops is None else f"{point.flops / 1e6:,.2f}"]
