"""Compile Triton launches for a GPU that is not there. Not to be imported where Triton interprets.

Each launch is specialised as `triton.jit` would: integers that are 1 become constants, those divisible by 16 and all
pointers are said to be.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from attentions import (
    GatedAttention,
    LinearAttention,
    SelfAttention,
    Swin,
    TransformerBlock,
    VisionTransformer,
    WindowAttention,
)
from fastinv.kernels.triton import convolution
from fastinv.kernels.triton.convolution import Tiled
from fastinv.kernels.triton.direct import DirectConvolution
from fastinv.kernels.triton.epilogue import Epilogue
from fastinv.kernels.triton.launch import Launch
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda import ops as cuda_ops
from fastinv.backends.cuda import pair as cuda_pair
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.backends.cuda.network import CudaNetwork
from fastinv.backends.cuda.solver import CudaSolver
from fastinv.benchmark import DECODERS, decoders, network_of, solvers
from fastinv.export import export
from fastinv.inverters import RMLE
from fastinv.models import cifar_net, lenet5, make_decoder
from fastinv.network import Network, Step
from fastinv.ops import OPS
from fastinv.ops.activation import KINDS, Activation
from fastinv.ops.add import Add
from fastinv.ops.conv2d import Conv2d
from fastinv.split import Split

META = torch.device("meta")
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
    torch.int8: "*i8",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one kernel in one configuration."""

    kernel: str
    constants: str
    wgmma: bool
    stack: int  # bytes of spilled registers and local arrays, for each thread
    registers: int  # for each thread
    shared: int  # bytes


def source_of(launch: Launch) -> tuple[ASTSource, str, str]:
    """The kernel with its types and constants; its configuration; and what else decides what the compiler makes of it:
    what is known of integers, and which of as many pixels a tile has."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = dict(launch.constants)
    attributes: dict[tuple[int, ...], Any] = {}
    values = {**launch.args, **launch.constants}
    for index, name in enumerate(launch.kernel.arg_names):
        value = values[name]
        if name in launch.constants or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{TYPES[value.base.dtype].removeprefix('*')}{list(value.block_shape)}>"
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    types = {name: "i32" if type(values[name]) is int else kind for name, kind in signature.items()}
    plain = dict(launch.constants)
    if "BI" in plain:  # boxes of images, rows and columns, whose descriptors have these shapes
        plain["BM"] = math.prod(plain.pop(name) for name in ("BI", "BY", "BX"))
        types = {name: kind.split("[")[0] for name, kind in types.items()}
    configuration = f"{launch.kernel.__name__} {types} {plain} {launch.warps} {launch.stages}"
    return ASTSource(launch.kernel, signature, constants, attributes), configuration, f"{constants} {attributes}"


def compile_all(launches: Iterable[Launch], capability: int = 90, variants: bool = False) -> list[Compiled]:
    """Every kernel in every configuration, once; or once for all else, too, that decides what becomes of it."""
    sources = {}
    for launch in launches:
        source, configuration, known = source_of(launch)
        sources.setdefault((configuration, known if variants else ""), (source, launch))
    return [_compiled(source, launch, capability) for source, launch in sources.values()]


def _compiled(source: ASTSource, launch: Launch, capability: int) -> Compiled:
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _usage(binary.asm["cubin"])
    return Compiled(
        launch.kernel.__name__,
        " ".join(f"{key}={value}" for key, value in launch.constants.items()),
        "wgmma" in binary.asm["ptx"],
        usage["STACK"],
        usage["REG"],
        binary.metadata.shared,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", text.stdout)}


# ---- what is compiled: all that the paper's networks launch, and one network of everything else --------------------

IMAGES = 4096
CASES = ("3x3", "odd-everything", "1x1", "depthwise", "grouped", "wide", "256-to-120", "bilinear-2", "full", "swap")


def network_launches(
    network: Network, precision: str, dtype: str = "float32", result: str = "float32", images: int = IMAGES
) -> list[Launch]:
    compiled = CudaNetwork(network, precision, META)
    features = torch.empty(images, *network.input_shape, dtype=getattr(torch, dtype), device=META)
    out = torch.empty(images, *network.output_shape, dtype=getattr(torch, result), device=META)
    note = torch.empty(16, device=META) if dtype in ("uint8", "int8") else None
    given = features, out, torch.empty(1, dtype=torch.int32), note, note
    memory = torch.empty(compiled._arena.bytes(images), dtype=torch.uint8, device=META)
    launches = compiled._arena.bind(images, memory, dict(zip(compiled._outside, given, strict=True)))
    return [launch for launch in launches if isinstance(launch, Launch)]


def solver_launches(recipe: RMLE, precision: str, images: int = IMAGES) -> list[Launch]:
    solver = CudaSolver(recipe, precision, META)
    outside = {
        buffer: torch.empty(images, buffer.elements, dtype=getattr(torch, buffer.dtype), device=META)
        for buffer in solver._outside
    }
    launches = []
    for arena in solver._arenas.values():
        memory = torch.empty(arena.bytes(images), dtype=torch.uint8, device=META)
        launches += arena.bind(images, memory, outside)
    return [launch for launch in launches if isinstance(launch, Launch)]


def other_tiles(network: Network, precision: str, differentiable: bool = True) -> Iterator[Launch]:
    """The convolutions of a network in every tile that tuning may choose, with ends that take many registers."""
    for node in Lowering(network, META, PRECISIONS[precision], differentiable=differentiable).nodes:
        for way in ("kernel", "back"):
            kernel = getattr(node, way, None)
            if isinstance(kernel, Tiled):
                shapes, dtype = (kernel.input_shape, kernel.output_shape), kernel.weight.dtype
                x, out = (torch.empty(IMAGES, *shape, dtype=dtype, device=META) for shape in shapes)
                end = Epilogue("gelu", addend=out) if way == "kernel" else Epilogue("relu", addend=out, saved=out)
                for tile in kernel.candidates:
                    yield kernel.with_tile(tile).launch(x, out, end)


def pair_launches(precisions: Iterable[str]) -> Iterator[Launch]:
    """Pairs of all kinds whose values fill the registers, whether they pay or not."""
    up = nn.ConvTranspose2d
    for channels, layers in (
        (128, (up(128, 64, 3, 2, 1, 1), nn.ReLU(), up(64, 3, 3, 1, 1))),
        (64, (up(64, 32, 4, 2, 1), nn.Sigmoid(), up(32, 3, 4, 2, 1))),
        (64, (nn.Conv2d(64, 64, 3), nn.GELU(), nn.Conv2d(64, 1, 5), nn.Sigmoid())),
        (72, (nn.Conv2d(72, 40, 3), nn.Softplus(), nn.Conv2d(40, 2, 3))),
        (128, (nn.Conv2d(128, 128, 3), nn.ReLU(), nn.Conv2d(128, 3, 3))),
        (24, (nn.Conv2d(24, 64, 3), nn.SiLU(), nn.Conv2d(64, 3, 3))),
        (24, (nn.Conv2d(24, 32, 3), nn.Tanh(), nn.Conv2d(32, 3, 3))),
    ):
        network = export(nn.Sequential(*layers).eval(), torch.zeros(2, channels, 40, 40))
        with patch.dict(cuda_pair.FLOPS_PER_BYTE, dict.fromkeys(cuda_pair.FLOPS_PER_BYTE, float("inf"))):
            for precision in precisions:
                yield from network_launches(network, precision)
                yield from other_tiles(network, precision, differentiable=False)


def direct_launches(layers: Iterable[nn.Module]) -> Iterator[Launch]:
    """Convolutions product by product, first on bytes and then between layers."""
    for layer in layers:
        network = export(nn.Sequential(layer).eval(), torch.zeros(2, layer.in_channels, 33, 31))
        for precision in ("float32", "bfloat16"):
            yield from network_launches(network, precision, "uint8", "uint8")
            for node in Lowering(network, META, PRECISIONS[precision], differentiable=True).nodes:
                for kernel in (node.kernel, node.back):
                    if isinstance(kernel, DirectConvolution):
                        shapes, dtype = (kernel.input_shape, kernel.output_shape), getattr(torch, precision)
                        x, out = (torch.empty(IMAGES, *shape, dtype=dtype, device=META) for shape in shapes)
                        yield kernel.launch(x, out, Epilogue("relu", addend=out, saved=out))


def activated_launches(kind: str, channels: int, precision: str) -> list[Launch]:
    """A convolution that ends in an activation, and one that something is added to before."""
    parameters = {"softplus": (1.0, 20.0), "clamp": (0.0, 1.0), "hardtanh": (0.0, 6.0), "elu": (1.0, 1.0)}
    activation = Activation(kind, *parameters.get(kind, (0.1, 0.0)))
    weights = {"weight": np.ones((channels, channels, 3, 3), np.float32), "bias": np.ones(channels, np.float32)}
    plain = Step(Conv2d(padding=(1, 1, 1, 1)), (0,), weights)
    first = dataclasses.replace(plain, activation=activation)
    steps = (first, dataclasses.replace(plain, inputs=(1,)), Step(Add(), (2, 0), activation=activation))
    return network_launches(Network((channels, 16, 16), steps), precision)


def benchmarked_launches(images: int = IMAGES) -> Iterator[Launch]:
    """All decoders and edges of the benchmarks: the paper's, residual ones, those in the style of ResNet-18."""
    for subject in decoders():
        for precision in PRECISIONS:
            yield from network_launches(subject.network, precision, images=images)
    for subject in solvers():
        for precision in ("float32", "tf32", "bfloat16"):
            yield from solver_launches(subject.recipe, precision, images)


def as_on_older_gpus() -> Any:
    """Pixels come by addresses, not as boxes by tensor descriptors."""
    return patch.object(convolution, "copies_boxes", lambda device: False)


def rare_launches() -> Iterator[Launch]:
    """What `all_launches` has a part of: every activation, every tile with all that it may end in, few images, pairs
    in tf32 and float16, as many products written out as there may be; and what older GPUs take."""
    yield from direct_launches((nn.Conv2d(20, 3, 9, padding=4), nn.Conv2d(3, 64, 7, 2, 3)))
    yield from pair_launches(("tf32", "float16"))
    for kind in KINDS:
        for channels in (64, 128):
            for precision in PRECISIONS:
                yield from activated_launches(kind, channels, precision)
    for choice in range(5):

        def choose(kernel: Tiled, device: torch.device, choice: int = choice) -> Tiled:
            return kernel.with_tile(kernel.candidates[min(choice, len(kernel.candidates) - 1)])

        with patch.object(cuda_ops, "tuned", choose), patch.object(cuda_pair, "tuned", choose):
            yield from benchmarked_launches()
    for images in (1, 3):
        yield from benchmarked_launches(images)
    network = export(make_decoder((128, 8, 8), (3, 32, 32)).eval(), torch.zeros(2, 128, 8, 8))
    with as_on_older_gpus():
        for precision in ("float32", "bfloat16"):
            yield from other_tiles(network, precision)
        yield from pair_launches(("float32", "bfloat16"))


def all_launches() -> Iterator[Launch]:
    cuda_native.extension = lambda: None  # what there is without it is what is compiled
    for features, image in DECODERS.values():  # the last is that of CIFAR ReLU32
        network = export(make_decoder(features, image).eval(), torch.zeros(2, *features))
        for precision in PRECISIONS if image == (3, 32, 32) else ("float32", "bfloat16"):
            yield from network_launches(network, precision)
    yield from other_tiles(network, "bfloat16")
    yield from other_tiles(network, "float32")
    for images in (1, 3):
        yield from network_launches(network, "bfloat16", images=images)
    for kind in ("gelu", "softplus", "elu"):
        for channels, precision in ((128, "bfloat16"), (128, "tf32"), (64, "tf32"), (64, "float32")):
            yield from activated_launches(kind, channels, precision)
    yield from network_launches(network, "bfloat16", "bfloat16", "uint8")
    yield from network_launches(network, "float16", "uint8", "uint8")
    for target, at, image in ((lenet5(), "ReLU2", (1, 28, 28)), (cifar_net(), "ReLU32", (3, 32, 32))):
        edge = export(Split(target, at).edge.eval(), torch.zeros(2, *image))
        recipe = RMLE(edge, image, steps=10, tv_beta=1.0)
        for precision in ("float32", "tf32", "bfloat16"):
            yield from solver_launches(recipe, precision)
        for precision in ("float32", "bfloat16"):
            yield from other_tiles(edge, precision)
        plain = {"optimizer": "sgd", "clamp": None, "tv_weight": 0.0}
        for options in ({"optimizer": "amsgrad", "keep": "best"}, plain):
            yield from solver_launches(dataclasses.replace(recipe, tv_beta=2.0, **options), "float32")
        yield from solver_launches(dataclasses.replace(recipe, optimizer="lbfgs"), "float32")
    for target, at, image in ((lenet5(), "conv1", (1, 28, 28)), (cifar_net(), "conv11", (3, 32, 32))):
        edge = export(Split(target, at).edge.eval(), torch.zeros(2, *image))
        recipe = RMLE(edge, image, steps=10, clamp=None)
        for options in ({"tv_beta": 1.0}, {"optimizer": "lbfgs"}, {"optimizer": "exact"}):
            yield from solver_launches(dataclasses.replace(recipe, **options), "float32")
    yield from pair_launches(("float32", "bfloat16"))
    with as_on_older_gpus():
        for precision in ("float32", "bfloat16"):
            yield from network_launches(network, precision)
    # The compiler takes 4 s for 75 products of 3 rows, and 20 for 250.
    up = nn.ConvTranspose2d
    yield from direct_launches(
        (
            nn.Conv2d(64, 4, 3, padding=1),
            nn.Conv2d(20, 3, 5, padding=2),
            nn.Conv2d(16, 16, 5),
            nn.Conv2d(3, 64, 5, 2, 2),
            up(64, 3, 4, 2, 1),
            up(12, 2, 5, (3, 4)),
        )
    )
    for name in ("conv2d", "conv_transpose2d", "linear", "upsample", "mul", "permute", "affine"):
        for case in OPS[name].cases():
            if case.name in CASES:
                yield from network_launches(network_of(case), "bfloat16")
    norms = nn.Sequential(nn.Conv2d(3, 64, 3), nn.GroupNorm(8, 64), nn.ReLU(), nn.InstanceNorm2d(64), nn.Flatten(2))
    edge = export(nn.Sequential(*norms, nn.LayerNorm(900), nn.RMSNorm(900)).eval(), torch.zeros(2, 3, 32, 32))
    for precision in ("float32", "bfloat16"):
        yield from solver_launches(RMLE(edge, (3, 32, 32), steps=10), precision)
    blocks = TransformerBlock(192, 3, SelfAttention), TransformerBlock(192, 6, SelfAttention)
    others = TransformerBlock(128, 2, GatedAttention), TransformerBlock(128, 2, LinearAttention)
    transformers = VisionTransformer(32, 4, 192, *blocks), VisionTransformer(32, 4, 128, *others)
    for module, image in ((transformers[0], 32), (transformers[1], 32), (Swin(WindowAttention), 16)):
        edge = export(module.eval(), torch.zeros(2, 3, image, image))
        for precision in ("float32", "tf32", "bfloat16")[:: 2 if image == 16 else 1]:  # what else there is is as above
            for launch in solver_launches(RMLE(edge, (3, image, image), steps=10), precision):
                if launch.kernel.__name__.startswith(("_attention", "_softmax", "_matmul")):
                    yield launch
    for kind in KINDS:
        edge = Network((5, 7, 9), (Step(Activation(kind, 0.5, 0.5), (0,)),))
        yield from solver_launches(RMLE(edge, edge.input_shape, steps=10), "float32")


if __name__ == "__main__":
    everything = bool(os.environ.get("FASTINV_TEST_ALL_KERNELS"))
    launches = itertools.chain(all_launches(), rare_launches() if everything else ())
    print(json.dumps([dataclasses.asdict(compiled) for compiled in compile_all(launches, variants=everything)]))
