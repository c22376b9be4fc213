"""What `gpu.py` finds: rows, and what they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastinv.cli.arguments import table

HOST_TO_HOST = "fastinv, host to host"


@dataclass(frozen=True)
class Row:
    """What one contender did with one case. Seconds are of one call on the whole batch."""

    case: str
    batch: int
    contender: str
    precision: str
    error: float
    seconds: float
    images_per_second: float  # of rMLE: image-steps
    tflops: float  # of the direct form
    gbytes_per_second: float  # of features in and results out
    percent_of_roofline: float
    ratio: float | None = None  # to the best peer of this precision


@dataclass(frozen=True)
class Ceilings:
    """What the GPU reaches here: bytes a second in a copy, FLOPs a second in a large product, by precision, and bytes a
    second from pinned memory of the host."""

    memory: float
    products: dict[str, float]
    host: float

    def floor(self, flops: float, bytes_moved: float, precision: str) -> float:
        """Seconds that no implementation of the direct form can be faster than.

        A product of float32 may be three of float16. What needs fewer FLOPs than the direct form can pass this: an edge
        of one convolution as a quadratic form does, as in rMLE through MNIST's conv1 and CIFAR-10's conv11.
        """
        rate = self.products[precision]
        if precision == "float32":
            rate = max(rate, self.products["float16"] / 3)
        return max(flops / rate, bytes_moved / self.memory)

    def floor_from_host(self, bytes_in: float, bytes_out: float) -> float:
        """Seconds that features and results take on their ways, which PCIe carries at the same time."""
        return max(bytes_in, bytes_out) / self.host


def compared(rows: Sequence[Row]) -> list[Row]:
    """Those of one case and precision, with their ratios to the best peer; the peers are on the GPU all the way."""
    best = min((row.seconds for row in rows if not row.contender.startswith("fastinv")), default=None)
    if best is None:
        return list(rows)
    return [row if row.contender == HOST_TO_HOST else replace(row, ratio=best / row.seconds) for row in rows]


def as_line(row: Row) -> str:
    return (
        f"{row.case}, {row.precision}: {row.contender}, {row.batch:,} images in {1e6 * row.seconds:,.1f} µs, "
        f"{row.percent_of_roofline:.1f}% of the roofline, error {row.error:.0e}"
    )


def as_table(rows: Sequence[Row]) -> str:
    header = ["", "precision", "batch", "error", "images/s", "TFLOP/s", "GB/s", "% of roofline", "to best peer"]
    return table(
        header,
        [
            [
                f"{row.case}: {row.contender}", row.precision, f"{row.batch:,}", f"{row.error:.0e}",
                f"{row.images_per_second:,.0f}", f"{row.tflops:.1f}", f"{row.gbytes_per_second:,.0f}",
                f"{row.percent_of_roofline:.1f}", "" if row.ratio is None else f"{row.ratio:.2f}",
            ]
            for row in rows
        ],
    )  # fmt: skip
