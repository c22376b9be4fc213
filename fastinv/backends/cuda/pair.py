"""Which convolutions go in one launch with the one before: a decoder's last, by a count of bytes and FLOPs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from fastinv.backends.cuda.nodes import ConvolutionNode, Node
from fastinv.backends.cuda.plan import Buffer
from fastinv.backends.cuda.small_tail import SmallTail
from fastinv.backends.cuda.tail import Tail
from fastinv.backends.cuda.tuning import native_is_faster, tuned

# FLOPs that tensor cores do while memory moves a byte, by how products are computed ("ieee": from two bytes). Data
# sheets give 156 (A100) to 295 (H100), half of them for tf32, of which float32 takes three; here it is about half of
# their middle, since neither is ever reached.
FLOPS_PER_BYTE = {"ieee": 100.0, "tf32": 50.0, "tf32x3": 50.0 / 3}


def join_pairs(nodes: list[Node], steps: list[tuple[int, ...]], output: Buffer) -> None:
    """Replace two nodes by one where a convolution with few outputs is all that reads the one before, and it pays.

    Args:
        nodes, steps: of a forward pass, changed in place.
        output: the result of the network.
    """
    readers = Counter([output, *(source for node in nodes for source in node.inputs)])
    for index in range(len(nodes) - 1, 0, -1):
        first, last = nodes[index - 1 : index + 1]
        if (
            isinstance(first, ConvolutionNode)
            and isinstance(last, ConvolutionNode)
            and last.inputs[0] is first.output
            and readers[first.output] == 1
            and len(first.inputs) == 1  # nothing is added between the two
            and (kernel := _of_two(first, last)) is not None
        ):
            nodes[index - 1 : index + 1] = [replace(last, inputs=first.inputs + last.inputs[1:], kernel=kernel)]
            steps[index - 1 : index + 1] = [steps[index - 1] + steps[index]]


def _of_two(first: ConvolutionNode, last: ConvolutionNode) -> Any:
    """The kernel of the two, or None where there is none or two launches cost less."""
    if SmallTail.fits(first, last):
        return SmallTail(first, last)
    pair = pair_of(first, last)
    if Tail.fits(first, last) and (pair is None or native_is_faster(pair, pair.weight.device)):
        return Tail(first, last, pair)
    return pair


def pair_of(first: ConvolutionNode, last: ConvolutionNode) -> Any:
    """The kernel of the two, or None where there is none or two launches cost less.

    Two launches write what is between once, and read it once; a pair does not, and computes its tiles whole instead:
    what they are larger than the layers, what lies in two of them, and columns of the second product that are empty.
    """
    from fastinv.kernels.triton.pair import Pair

    if not Pair.fits(first.kernel, last.kernel, last.weight):
        return None
    activation = first.ending.activation
    pair = Pair(first.kernel, last.kernel, last.weight, (activation.kind, activation.a, activation.b))
    more = pair.flops - first.kernel.flops - last.kernel.flops
    saved = 2 * first.output.elements * first.kernel.weight.dtype.itemsize
    pays = more <= FLOPS_PER_BYTE[first.kernel.precision] * saved
    return tuned(pair, pair.weight.device) if pays else None
