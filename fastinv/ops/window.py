"""What sliding windows of pools have in common: PyTorch's rules for their attributes and output size."""

from __future__ import annotations

from fastinv.ops.base import MAX_ATTRIBUTE, Op, Pair, expect


def expect_window(op: Op, kernel: Pair, stride: Pair, padding: Pair, dilation: Pair = (1, 1)) -> None:
    """Check the attributes of a pool."""
    expect(
        all(1 <= v <= MAX_ATTRIBUTE for v in (*kernel, *stride, *dilation)),
        f"{op.name}: kernel {kernel}, stride {stride}, dilation {dilation}: expected >= 1",
    )
    expect(
        all(0 <= p <= k // 2 for p, k in zip(padding, kernel, strict=True)),
        f"{op.name}: padding {padding}, expected 0 to half of the kernel {kernel}",
    )


def pooled_size(
    op: Op, size: int, kernel: int, stride: int, padding: int, dilation: int = 1, *, ceil_mode: bool
) -> int:
    """Output size of a pool along one axis."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # the last window must begin inside the input or its left padding
    expect(count >= 1, f"{op.name}: kernel {kernel} does not fit input size {size} with padding {padding}")
    return count
