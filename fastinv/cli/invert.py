"""Recover images from a file of features, to a .npy file or a folder of PNGs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import fastinv
from fastinv import tensors
from fastinv.backends.base import Report
from fastinv.cli import files
from fastinv.cli.arguments import add_compile_arguments, numbers, plural, positive, shows_progress
from fastinv.errors import FeatureError, FormatError, Interrupted, NetworkError
from fastinv.invert import DTYPES

LAYOUTS = ("NCHW", "NHWC")
WORDS = {
    "pass np.transpose(features, (0, 3, 1, 2)), or .permute in torch": "pass --layout NHWC",
    "pass scale=": "pass --scale",
    "scale and zero_point are": "--scale and --zero-point are",
    "pass features": "save features",
}
OPTIONS = ("backend", "precision", "threads", "device", "batch_size", "scale", "zero_point")  # of `fastinv.invert`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "features",
        metavar="FEATURES",
        type=Path,
        help="the features [N, ...] in a .npy, .npz, .safetensors or .pt (tensors only) file",
    )
    parser.add_argument(
        "-m", "--inverter", metavar="FILE", help="the .finv file; FASTINV_INVERTER names it where left out"
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", type=Path, required=True, help="a .npy file, or a new folder for PNGs"
    )
    parser.add_argument("--key", help="which array of a file that holds several")
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="of the features: NHWC has channels last")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of a .npy file: pixels 0-1 or 0-255")
    parser.add_argument("--batch-size", type=positive, help="images run at once; does not change the result")
    parser.add_argument("--scale", type=numbers, help="of quantised features: a number or one a channel: 0.1,0.2")
    parser.add_argument("--zero-point", type=numbers, help="as --scale; negative ones as in --zero-point=-5,3")
    parser.add_argument("--device", help="cpu, cuda or as in cuda:1; what --backend says where left out")
    add_compile_arguments(parser)


def run(args: argparse.Namespace) -> None:
    path = args.inverter or os.environ.get("FASTINV_INVERTER")
    if not path:
        raise NetworkError("no inverter: pass -m FILE or set FASTINV_INVERTER")
    files.expect_apart(args.out, features=args.features, inverter=Path(path))
    inverter = fastinv.load(path)
    features = _channels_first(files.read_features(args.features, args.key), args.layout)
    options = {name: getattr(args, name) for name in OPTIONS}
    if args.out.suffix not in ("", ".npy"):
        raise FormatError(f"{args.out}: suffix {args.out.suffix!r}, expected .npy, or a folder's name for PNGs")
    try:
        images, report = _write(features, inverter, args.out, options, args.dtype)
    except Interrupted as stopped:
        raise KeyboardInterrupt(_keep(stopped, inverter, args.out)) from None
    except FeatureError as error:
        raise FeatureError(_in_words_of_the_shell(str(error))) from None
    print(f"{args.out}: {_summary(images, report)}")


def _channels_first(features: Any, layout: str) -> Any:
    """The features as [N, C, H, W], in the same memory."""
    if layout == "NCHW":
        return features
    if features.ndim != 4:
        raise FeatureError(f"features of shape {list(features.shape)}, but --layout NHWC is of four axes: leave it out")
    return features.transpose(0, 3, 1, 2) if isinstance(features, np.ndarray) else features.permute(0, 3, 1, 2)


def _in_words_of_the_shell(message: str) -> str:
    """What to do, by an option instead of by an argument in Python."""
    for python, shell in WORDS.items():
        message = message.replace(python, shell)
    return message


def _write(
    features: Any, inverter: fastinv.Inverter, out: Path, options: dict[str, Any], dtype: str
) -> tuple[npt.NDArray[Any], Report]:
    """Recover the images to `out`, whole or not at all."""
    if out.suffix == ".npy":
        with files.replacing(out) as temporary:
            return _recover(features, inverter, temporary, options | {"dtype": dtype})
    files.check_png(inverter.image_shape)
    with files.replacing(out, folder=True) as temporary:
        array = temporary / "images.npy"
        images, report = _recover(features, inverter, array, options | {"dtype": "uint8"})
        for index, image in enumerate(tqdm(images, unit="image", desc="write", disable=None)):
            files.write_png(temporary / f"{index:06}.png", image)
        array.unlink()
    return images, report


def _keep(stopped: Interrupted, inverter: fastinv.Inverter, out: Path) -> str:
    """Write the images that there are beside `out`, which stays as it was; the words to say so."""
    count = f"{stopped.begun:,} of {plural(len(stopped.images), 'image')}"
    if stopped.begun == 0:
        return f"interrupted before the first of {count.partition(' of ')[2]}"
    name = out.name.removesuffix(".npy")
    names = (f"{name}.partial{number}.npy" for number in ("", *range(2, 10_000)))
    partial = next(place for name in names if not (place := out.with_name(name)).exists())  # none is lost
    with files.replacing(partial) as temporary, open(temporary, "wb") as file:
        np.save(file, stopped.images[: stopped.begun])
    report, kept = stopped.report, slice(stopped.begun)
    steps = inverter.steps if isinstance(inverter, fastinv.RMLE) else 0
    unfinished = stopped.begun - int((report.converged[kept] | (report.steps[kept] >= steps)).sum())
    rest = f"; {unfinished:,} of them are not finished, but as far as rMLE had come" if unfinished else ""
    return f"interrupted: the first {count} are in {partial}{rest}"


def _recover(
    features: Any, inverter: fastinv.Inverter, path: Path, options: dict[str, Any]
) -> tuple[npt.NDArray[Any], Report]:
    """The images, in a mapped file at `path`, so that memory does not grow with their number."""
    quantised = {name: options[name] for name in ("scale", "zero_point")}
    count = len(tensors.source(features, inverter.feature_shape, **quantised))
    images = np.lib.format.open_memmap(path, "w+", options["dtype"], (count, *inverter.image_shape))
    with open(path, "r+b") as file:  # on a full disk this raises; writing to the map would end the process
        os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))
    _, report = fastinv.invert(features, inverter, out=images, return_report=True, progress=shows_progress(), **options)
    images.flush()
    return images, report


def _summary(images: npt.NDArray[Any], report: Report) -> str:
    lines = [f"{plural(len(images), 'image')} [{', '.join(map(str, images.shape[1:]))}] {images.dtype}"]
    lines.append(f"{report.backend}, {report.isa}")
    if report.objective is not None and len(images):
        lines.append(f"mean objective {report.objective.mean():.6g}")
    return "; ".join(lines)
