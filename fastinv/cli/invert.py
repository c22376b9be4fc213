"""Recover images from features: of one file to a .npy file or a folder of PNGs, of a whole log to as many files."""

from __future__ import annotations

import argparse
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

import fastinv
from fastinv import tensors
from fastinv.backends.base import Report
from fastinv.bulk.features import LAYOUTS, SUFFIXES, Choice, read
from fastinv.bulk.images import FORMATS, check_png, write_png
from fastinv.bulk.log import LogReport, invert_log
from fastinv.cli import files
from fastinv.cli.arguments import add_compile_arguments, numbers, plural, positive, shows_progress
from fastinv.errors import FeatureError, FormatError, Interrupted, NetworkError
from fastinv.invert import DTYPES

WORDS = {
    "pass np.transpose(features, (0, 3, 1, 2)), or .permute in torch": "pass --layout NHWC",
    "pass scale=": "pass --scale",
    "with scale=": "with --scale",
    "with stored_as=": "with --stored-as",
    "pass key=": "pass --key",
    "with ids=": "with --ids",
    "but layout NHWC is": "but --layout NHWC is",
    "scale and zero_point are": "--scale and --zero-point are",
    "pass features": "save features",
}
OPTIONS = ("backend", "precision", "threads", "device", "batch_size", "scale", "zero_point")  # of `fastinv.invert`
OF_LOGS = ("ids", "rows_per_file", "part", "retry_failed", "dry_run")  # of `fastinv.invert_log` alone
FAILED = 3  # exit code: finished, but some rows or files could not be recovered


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "features",
        metavar="FEATURES",
        type=Path,
        nargs="+",
        help=f"a file of features [N, ...] ({', '.join(SUFFIXES)}); or a log: a folder of such files, or several",
    )
    parser.add_argument(
        "-m", "--inverter", metavar="FILE", help="the .finv file; FASTINV_INVERTER names it where left out"
    )
    parser.add_argument(
        "-o", "--out", metavar="OUT", type=Path, help="a .npy file, or a new folder for PNGs; of a log its folder"
    )
    parser.add_argument("--key", help="which array or column of a file that holds several")
    parser.add_argument("--layout", choices=LAYOUTS, default="NCHW", help="of the features: NHWC has channels last")
    parser.add_argument(
        "--stored-as",
        choices=tensors.FLOATS + tensors.QUANTISED,
        help="the type of numbers that a table holds as bytes; float32 where left out",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="pixels 0-1 or 0-255; where left out float32 in one file, uint8 of a log"
    )
    parser.add_argument("--batch-size", type=positive, help="images run at once; does not change the result")
    parser.add_argument("--scale", type=numbers, help="of quantised features: a number or one a channel: 0.1,0.2")
    parser.add_argument("--zero-point", type=numbers, help="as --scale; negative ones as in --zero-point=-5,3")
    parser.add_argument("--device", help="cpu, cuda or as in cuda:1; what --backend says where left out")
    add_compile_arguments(parser)
    log = parser.add_argument_group("logs", "A log's results go to a folder, and the same command goes on with it.")
    log.add_argument("--format", choices=FORMATS, help="parquet where left out; given, one file is a log, too")
    log.add_argument("--ids", metavar="KEY", help="the array or column of the rows' names; a table's is id")
    log.add_argument("--rows-per-file", type=positive, help="cut files into several: an interruption costs no more")
    log.add_argument("--part", type=part, metavar="K/N", help="the K-th of N parts: N machines share a log so")
    log.add_argument("--retry-failed", action="store_true", help="do files again of which rows failed")
    log.add_argument("--dry-run", action="store_true", help="count, look at the first rows, and write nothing")


def part(text: str) -> tuple[int, int]:
    """`2/8`: the second of eight parts."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected K/N such as 2/8")
    return int(match[1]), int(match[2])


def run(args: argparse.Namespace) -> int:
    if args.out is None and args.format != "none":
        args.misused("-o is needed, but for --format none")
    path = args.inverter or os.environ.get("FASTINV_INVERTER")
    if not path:
        raise NetworkError("no inverter: pass -m FILE or set FASTINV_INVERTER")
    try:
        if args.format is not None or len(args.features) > 1 or args.features[0].is_dir():
            return _log(args, path)
        return _file(args, args.features[0], path)
    except (FeatureError, FormatError) as error:
        raise type(error)(_in_words_of_the_shell(str(error))) from None


def _file(args: argparse.Namespace, path: Path, inverter_path: str) -> int:
    """Recover what is in one file."""
    for name in OF_LOGS:
        if getattr(args, name):
            args.misused(f"--{name.replace('_', '-')} is for logs: pass --format, too")
    files.expect_apart(args.out, features=path, inverter=Path(inverter_path))
    inverter = fastinv.load(inverter_path)
    choice = Choice(args.key, None, args.layout, args.stored_as)
    features = read(path, inverter.feature_shape, choice)
    options = {name: getattr(args, name) for name in OPTIONS}
    if args.out.suffix not in ("", ".npy"):
        raise FormatError(f"{args.out}: suffix {args.out.suffix!r}, expected .npy, or a folder's name for PNGs")
    try:
        images, report = _write(features, inverter, args.out, options, args.dtype or "float32")
    except Interrupted as stopped:
        raise KeyboardInterrupt(_keep(stopped, inverter, args.out)) from None
    print(f"{args.out}: {_summary(images, report)}")
    return 0


def _log(args: argparse.Namespace, inverter: str) -> int:
    """Recover a whole log; 3 where something in it could not be."""
    options = {name: getattr(args, name) for name in (*OPTIONS, *OF_LOGS, "key", "layout", "stored_as")}
    options |= {"format": args.format or "parquet", "dtype": args.dtype or "uint8", "part": args.part or (1, 1)}
    log = args.features if len(args.features) > 1 else args.features[0]
    report = invert_log(log, inverter, args.out, progress=True, **options)
    for error in report.errors.values():
        print(_in_words_of_the_shell(error), file=sys.stderr)
    print(f"{'nothing written' if args.format == 'none' else args.out}: {_counts(report, args.dry_run)}")
    return 0 if report.complete else FAILED


def _counts(report: LogReport, dry_run: bool) -> str:
    shards = plural(report.shards, "file")
    skipped = f", {report.skipped:,} of them there before" if report.skipped else ""
    failed = f"; {plural(report.failed, 'row')} failed: see .errors.jsonl" if report.failed else ""
    if report.errors:
        failed += f"; {plural(len(report.errors), 'file')} failed"
    if dry_run:
        return f"{shards}{skipped}, {plural(report.rows, 'row')}{failed}; nothing is written in a dry run"
    rate = report.images / report.seconds if report.seconds else 0.0
    this_time = f", {report.images:,} this time in {report.seconds:,.1f} s ({rate:,.0f} a second)"
    return f"{shards}{skipped}, {plural(report.recovered, 'image')}{this_time}{failed}"


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
    check_png(inverter.image_shape)
    with files.replacing(out, folder=True) as temporary:
        array = temporary / "images.npy"
        images, report = _recover(features, inverter, array, options | {"dtype": "uint8"})
        for index, image in enumerate(tqdm(images, unit="image", desc="write", disable=None)):
            write_png(temporary / f"{index:06}.png", image)
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
