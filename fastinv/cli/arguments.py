"""What the commands' options share."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from fastinv.engine import MAX_THREADS
from fastinv.inverters import Inverter
from fastinv.schedule import PRECISIONS

PRECISION = "what to compute in: float32, bfloat16, on a GPU float16 and tf32; auto: the fastest exact enough"
UNITS = {"": 1, "k": 1_000, "m": 1_000_000}


def add_training_arguments(parser: argparse.ArgumentParser) -> None:
    """What all training has in common."""
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="of training; left out: float32; bfloat16 is faster on a GPU, and on a CPU with AMX",
    )
    parser.add_argument("--device", help="what trains: cpu, cuda or as in cuda:1; left out: cpu")


def integer(text: str) -> int:
    """A whole number >= 0: `60000`, `60_000`, `60k` or `1M`."""
    match = re.fullmatch(r"(\d+(?:_\d+)*)([km]?)", text.lower())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number such as 64, 10k or 1M")
    return int(match[1]) * UNITS[match[2]]


def positive(text: str) -> int:
    """A whole number >= 1."""
    number = integer(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least 1")
    return number


def threads(text: str) -> int:
    """A number of threads."""
    number = integer(text)
    if not 1 <= number <= MAX_THREADS:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1 to {MAX_THREADS}")
    return number


def numbers(text: str) -> float | list[float]:
    """A number, or several separated by commas."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number or several, as in 0.1,0.2") from None
    return values[0] if len(values) == 1 else values


def start(text: str) -> float | Path:
    """A number, or a path."""
    try:
        return float(text)
    except ValueError:
        return Path(text)


def add_compile_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `fastinv.compile`."""
    parser.add_argument("--backend", default="auto", help="cuda, cpu or torch; auto: the first that can run it")
    parser.add_argument(
        "--precision",
        default="float32",
        help=PRECISION,
    )
    parser.add_argument("--threads", type=threads, help="threads to use; all cores where left out")


def shows_progress() -> bool:
    """Whether to show progress bars: not where they would fill a log file."""
    return sys.stderr.isatty()


def plural(count: int, noun: str) -> str:
    """`1 image`, `1,000 images`."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def shapes(inverter: Inverter) -> str:
    """`features [16, 8, 8] -> images [1, 28, 28]`."""
    return f"features {list(inverter.feature_shape)} -> images {list(inverter.image_shape)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Rows under a header, as aligned text: columns of numbers but the first to the right, others to the left."""
    columns: list[list[str]] = []
    for cells in zip(header, *rows, strict=True):
        width = max(map(len, cells))
        numeric = columns and all(cell[:1].isdigit() for cell in cells[1:])
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))
