"""The ops, one file each. `OPS` is the one table that lists them."""

from fastinv.ops.activation import Activation
from fastinv.ops.adaptive_avg_pool2d import AdaptiveAvgPool2d
from fastinv.ops.add import Add
from fastinv.ops.affine import Affine
from fastinv.ops.attention import Attention
from fastinv.ops.avg_pool2d import AvgPool2d
from fastinv.ops.base import Op
from fastinv.ops.concat import Concat
from fastinv.ops.conv2d import Conv2d
from fastinv.ops.conv_transpose2d import ConvTranspose2d
from fastinv.ops.linear import Linear
from fastinv.ops.matmul import Matmul
from fastinv.ops.max_pool2d import MaxPool2d
from fastinv.ops.mul import Mul
from fastinv.ops.normalize import Normalize
from fastinv.ops.permute import Permute
from fastinv.ops.pixel_shuffle import PixelShuffle
from fastinv.ops.reshape import Reshape
from fastinv.ops.roll import Roll
from fastinv.ops.separable import Separable
from fastinv.ops.softmax import Softmax
from fastinv.ops.upsample import Upsample

OPS: dict[str, type[Op]] = {
    op.name: op
    for op in (
        Conv2d,
        ConvTranspose2d,
        Linear,
        MaxPool2d,
        AvgPool2d,
        AdaptiveAvgPool2d,
        Upsample,
        Separable,
        PixelShuffle,
        Add,
        Mul,
        Affine,
        Normalize,
        Attention,
        Matmul,
        Softmax,
        Concat,
        Reshape,
        Permute,
        Roll,
        Activation,
    )
}
