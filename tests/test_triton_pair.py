"""Two convolutions in one launch, against the torch reference; without a GPU in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.kernels.triton import convolution
from fastinv.kernels.triton.pair import Pair
from interpreter import DEVICE, forward, network_on

from fastinv import tensors
from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda import ops as cuda_ops
from fastinv.backends.cuda import pair as cuda_pair
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.benchmark import DECODERS, RESIDUAL_DECODERS
from fastinv.models import make_decoder
from fastinv.network import Network

# Relative. The interpreter computes tf32 products in float32.
TOLERANCES = {"float32": 1e-5, "tf32": 1e-5 if DEVICE == "cpu" else 5e-3, "float16": 5e-3}


def up(inputs: int, outputs: int, kernel: int, stride: int, padding: int = 0, more: int = 0) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, kernel, stride, padding, output_padding=more)


# name -> (input shape, layers): both kinds in both places, steps of 1, 2 and 4, 1 to 4 outputs, odd shapes.
PAIRS: dict[str, tuple[tuple[int, ...], tuple[nn.Module, ...]]] = {
    "up-2 then to-rgb": ((16, 4, 5), (up(16, 24, 3, 2, 1, 1), nn.ReLU(), up(24, 3, 3, 1, 1))),
    "conv then conv": ((16, 7, 9), (nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1))),
    "to one, no padding": ((5, 9, 6), (nn.Conv2d(5, 7, 3), nn.LeakyReLU(0.1), nn.Conv2d(7, 1, 3), nn.Sigmoid())),
    "up-2 after a conv": ((16, 5, 6), (up(16, 8, 5, 1), nn.ReLU(), up(8, 1, 5, 2, 0, 1))),
    "up-2 twice": ((16, 3, 4), (up(16, 20, 4, 2, 1), nn.Tanh(), up(20, 3, 4, 2, 1))),
    "upsampling before": ((8, 3, 5), (nn.Upsample(scale_factor=2), *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
                                      *(nn.Conv2d(16, 3, 3, padding=1), nn.Sigmoid()))),
    "upsampling between": ((8, 5, 3), (nn.Conv2d(8, 16, 3, padding=1), nn.Sigmoid(), nn.Upsample(scale_factor=2),
                                       nn.Conv2d(16, 2, 3, padding=1))),
    "stride in front": ((4, 11, 9), (nn.Conv2d(4, 16, 3, 2), nn.SiLU(), nn.Conv2d(16, 4, (3, 1), dilation=(2, 1)))),
    "steps of 3 and 1": ((6, 3, 4), (up(6, 10, (4, 2), (3, 1)), nn.ReLU(), up(10, 1, 2, (1, 2)))),
    "fewer taps than steps": ((4, 5, 3), (up(4, 6, 1, 2), nn.Sigmoid(), up(6, 2, 1, (1, 2), 0, (0, 1)))),
    "many between": ((16, 4, 3), (nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1))),
    "larger than a tile": ((16, 21, 19), (nn.Conv2d(16, 16, 3, padding=1), nn.Sigmoid(), up(16, 3, 3, 1, 1))),
    "larger than a tile, up-2": ((16, 18, 35), (up(16, 16, 3, 2, 1, 1), nn.Sigmoid(), up(16, 1, 3, 1, 1))),
}  # fmt: skip


@pytest.fixture(autouse=True)
def by_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are no kernels in CUDA C++, which take the place of some pairs."""
    monkeypatch.setattr(cuda_native, "extension", lambda: None)


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it costs, also where the first layer alone would be taken product by product."""
    monkeypatch.setattr(cuda_ops, "_few", lambda inputs, itemsize: 4 if itemsize == 4 else 0)
    monkeypatch.setattr(cuda_pair, "FLOPS_PER_BYTE", dict.fromkeys(cuda_pair.FLOPS_PER_BYTE, float("inf")))


def pair_in(network: Network, precision: str = "float32") -> Pair | None:
    """The network's only node, where that is a pair."""
    kernels = [getattr(node, "kernel", None) for node in Lowering(network, DEVICE, PRECISIONS[precision]).nodes]
    assert len(kernels) == 1 or not any(isinstance(kernel, Pair) for kernel in kernels[:-1])
    return kernels[-1] if isinstance(kernels[-1], Pair) else None


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str, precision: str, always: None) -> None:
    shape, layers = PAIRS[name]
    network = exported(shape, *layers)
    pair = pair_in(network, precision)
    assert pair is not None
    assert np.prod(pair.tiles) > 1 or "larger" not in name
    x = randn(2, *shape)
    assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", PAIRS)
def test_pairs_without_boxes(name: str, precision: str, always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On older GPUs the first layer's pixels come by addresses."""
    shape, layers = PAIRS[name]
    network = exported(shape, *layers)
    pair = pair_in(network, precision)
    assert pair is not None
    assert pair.tile.boxes == (shape[0] >= 16)
    monkeypatch.setattr(convolution, "copies_boxes", lambda device: False)
    pair = pair_in(network, precision)
    assert pair is not None
    assert not any(tile.boxes for tile in pair.candidates)
    x = randn(2, *shape)
    assert relative(forward(network, x, precision), reference(network, x)) < TOLERANCES[precision]


@pytest.mark.parametrize("size", [(4, 4), (16, 4), (4, 8), (16, 16)])
@pytest.mark.parametrize("name", ["up-2 then to-rgb", "conv then conv", "up-2 after a conv"])
def test_tiles_of_any_shape(name: str, size: tuple[int, int], always: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ragged ones, at every edge."""
    monkeypatch.setattr(Pair, "_best", lambda self, cells: size)
    shape, layers = PAIRS[name]
    network = exported(shape, *layers)
    assert pair_in(network, "tf32") is not None
    x = randn(2, *shape)
    assert relative(forward(network, x, "tf32"), reference(network, x)) < TOLERANCES["tf32"]


def test_an_image_has_one_answer_in_any_batch(always: None) -> None:
    shape, layers = PAIRS["up-2 then to-rgb"]
    network = exported(shape, *layers)
    assert pair_in(network) is not None
    x = randn(5, *shape)
    whole = np.empty((5, *network.output_shape), np.float32)
    network_on(network).run(x, whole)
    assert relative(whole, reference(network, x)) < 1e-5
    for most in (1, 3):
        out = np.empty_like(whole)
        network_on(network, most=most).run(x, out)
        np.testing.assert_array_equal(out, whole)
    network_on(network).run(x[:0], whole[:0])


def test_results_as_bytes(always: None) -> None:
    shape, layers = PAIRS["to one, no padding"]
    network = exported(shape, *layers)
    x = randn(3, *shape)
    out = np.empty((3, *network.output_shape), np.uint8)
    assert network_on(network).run_raw(tensors.source(x, shape), out)
    assert np.abs(out - np.rint(np.clip(reference(network, x), 0, 1) * 255)).max() <= 1


class Added(nn.Module):
    """What is added after the pair, or between."""

    def __init__(self, between: bool) -> None:
        super().__init__()
        self.between = between
        self.side = nn.Conv2d(4, 16 if between else 3, 1)
        self.first, self.last = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = self.side(x)
        if self.between:
            return self.last((side + self.first(x)).relu())
        return (self.last(self.first(x).relu()) + side).tanh()


@pytest.mark.parametrize("between", [False, True])
def test_what_is_added(between: bool, always: None) -> None:
    network = exported((4, 5, 6), Added(between))
    kernels = [type(node.kernel).__name__ for node in Lowering(network, DEVICE, PRECISIONS["float32"]).nodes]
    assert ("Pair" in kernels) == (not between)
    x = randn(2, 4, 5, 6)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5


class ReadTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(16, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(x).relu()
        return self.last(y) * y


@pytest.mark.parametrize(
    "layers",
    [
        (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 5, 3)),  # many outputs
        (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 3, 2)),  # a stride
        (nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 3, 7)),  # many taps
        (nn.Conv2d(16, 130, 3), nn.ReLU(), nn.Conv2d(130, 1, 3)),  # many channels between
        (nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(16, 3, 3)),  # groups
        (nn.Conv2d(16, 16, 3), nn.MaxPool2d(2), nn.Conv2d(16, 3, 3)),  # something between
        (ReadTwice(),),
    ],
)
def test_what_is_no_pair(layers: tuple[nn.Module, ...], always: None) -> None:
    assert pair_in(exported((16, 12, 12), *layers), "bfloat16") is None


def test_solvers_keep_what_is_between(always: None) -> None:
    shape, layers = PAIRS["conv then conv"]
    assert len(Lowering(exported(shape, *layers), DEVICE, PRECISIONS["float32"], differentiable=True).nodes) == 2


def test_pairs_are_taken_where_they_pay() -> None:
    """By bytes and FLOPs; a decoder that is one layer, or whose largest value is a few KB, has none."""
    found = {}
    for kind, decoders in (("paper", DECODERS), ("residual", RESIDUAL_DECODERS)):
        for name, (features, image) in decoders.items():
            network = exported(features, make_decoder(features, image, kind, depth=0))
            found[name] = {p for p in PRECISIONS if pair_in(network, p)} if len(network.steps) > 1 else set()
    assert found["MNIST conv1"] == found["MNIST ReLU2"] == found["CIFAR conv11"] == set()
    for name in ("CIFAR ReLU22", "CIFAR ReLU32", "residual 32x32"):
        assert found[name] == set(PRECISIONS)
    # Several tiles an image: what is computed twice is cheaper than memory, but not in three products each.
    assert found["residual 64x64"] == {"tf32", "float16", "bfloat16"}


def test_the_plan_is_told() -> None:
    shape, image = DECODERS["CIFAR ReLU32"]
    network = exported(shape, make_decoder(shape, image))
    first, pair = network_on(network, "bfloat16").describe()
    assert (first["step"], pair["step"]) == (0, 2)
    assert pair["kernel"] == "Pair 256x64x64, boxes"
    assert first["flops"] + pair["flops"] == network.flops
    between = 4 * int(np.prod(network.shapes[2]))
    assert pair["bytes"] == network.costs[1].bytes + network.costs[2].bytes - 2 * between
