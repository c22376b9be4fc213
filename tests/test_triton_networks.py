"""The GPU backend end to end: the paper's decoders and edges, and rMLE; without a GPU in the interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import make
from checks import InterruptAt, exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from interpreter import DEVICE, check_features, check_solver, network_on, recipe_for, solver_on

from fastinv import _core, tensors
from fastinv.backends.cuda import host as cuda_host
from fastinv.backends.cuda import native as cuda_native
from fastinv.backends.cuda import network as cuda_network
from fastinv.backends.cuda import stream as cuda_stream
from fastinv.benchmark import DECODERS
from fastinv.errors import FeatureError
from fastinv.models import cifar_net, lenet5, make_decoder
from fastinv.network import Network
from fastinv.split import Split

TOLERANCES = {"float32": 1e-5, "float16": 5e-3}  # relative
EDGES = ("conv1", "ReLU2", "conv11", "ReLU22", "ReLU32")


def edges_of(mnist: int, cifar: int) -> dict[str, Network]:
    """The paper's five edges, for images of so many rows and columns."""
    torch.manual_seed(0)
    found = {}
    for target, image, splits in (
        (lenet5(), (1, mnist, mnist), ("conv1", "ReLU2")),
        (cifar_net(), (3, cifar, cifar), ("conv11", "ReLU22", "ReLU32")),
    ):
        for at in splits:
            found[at] = exported(image, Split(target, at).edge)
    return found


@pytest.fixture(scope="module")
def edges() -> dict[str, Network]:
    return edges_of(28, 32)


@pytest.fixture(scope="module")
def small_edges() -> dict[str, Network]:
    return edges_of(20, 16)


def decoder(name: str) -> Network:
    torch.manual_seed(0)
    features, image = DECODERS[name]
    return exported(features, make_decoder(features, image))


@pytest.fixture
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is where the kernels in CUDA C++ are not built."""
    monkeypatch.setattr(cuda_native, "extension", lambda: None)


def check_decoder(name: str, precision: str) -> None:
    network = decoder(name)
    x = randn(2, *network.input_shape)
    out = np.empty((2, *network.output_shape), np.float32)
    network_on(network, precision).run(x, out)
    assert relative(out, reference(network, x)) < TOLERANCES[precision]


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str, precision: str) -> None:
    check_decoder(name, precision)


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("name", ["MNIST ReLU2", "CIFAR ReLU22", "CIFAR ReLU32"])  # the others are Triton's anyhow
def test_decoders_of_triton_alone(name: str, precision: str, triton_alone: None) -> None:
    check_decoder(name, precision)


def check_rmle(name: str, edges: dict[str, Network]) -> None:
    steps = 1 if name in ("ReLU22", "ReLU32") else 2  # the interpreter takes seconds for each
    check_solver(recipe_for(edges[name], steps=steps), count=1)


@pytest.mark.parametrize("name", EDGES)
def test_rmle_through_the_paper_s_edges(name: str, edges: dict[str, Network]) -> None:
    check_rmle(name, edges)


@pytest.mark.parametrize("name", EDGES)
def test_rmle_by_triton_alone(name: str, small_edges: dict[str, Network], triton_alone: None) -> None:
    check_rmle(name, small_edges)


@pytest.mark.parametrize(
    "name", ["group-norm-blocks", "convnext-prefix", "vision-transformer-one-layer", "swin-v2", "gated-attention"]
)
def test_rmle_through_edges_of_other_people(name: str) -> None:
    """Norms on the statistics of an image, attention, windows of it, products and softmaxes among all else."""
    module, shape = make(name)
    check_solver(recipe_for(exported(shape, module), steps=2, lr=1e-2), count=3, most=2, within=1e-3)


def small_edge() -> Network:
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    return exported((2, 6, 8), module)


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 0},
        {"steps": 5, "optimizer": "amsgrad", "betas": (0.5, 0.6)},
        {"steps": 4, "optimizer": "sgd", "momentum": 0.9, "lr": 1e-3},
        {"steps": 5, "optimizer": "sgd", "lr": 1e-3, "schedule": "cosine"},
        {"steps": 4, "schedule": "cosine", "tv_beta": 1.0, "tv_weight": 0.3},
        {"steps": 3, "tv_beta": 3.0},
        {"steps": 6, "lr": 1.5, "clamp": (0.2, 0.7), "mean": (0.5, 0.4), "std": (0.5, 0.3)},
        {"steps": 7, "lr": 1.5, "keep": "best", "tv_weight": 0.0},
        {"steps": 8, "lr": 0.3, "tolerance": 0.2, "patience": 2},
        {"steps": 8, "lr": 0.3, "tolerance": 0.2, "keep": "best"},
    ],
    ids=lambda options: " ".join(f"{key}={value}" for key, value in options.items()),
)
def test_rmle_options(options) -> None:
    """In batches of 2, the last of which is not full."""
    check_solver(recipe_for(small_edge(), **options), count=3, most=2)


def test_rmle_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastinv.backends.cuda.batch.LOOK", 2)
    told: list[tuple[int, int]] = []
    solver = solver_on(recipe_for(small_edge(), steps=8), most=4)
    start, features = randn(3, 2, 6, 8), randn(3, 4, 3, 4)
    solver.solve(features, start, lambda images, steps: told.append((images, steps)))
    assert told == [(0, 8), (0, 16), (2, 16), (2, 20), (2, 24)]


def test_rmle_keeps_what_ctrl_c_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastinv.backends.cuda.batch.LOOK", 2)
    recipe = recipe_for(small_edge(), steps=8)
    start, features = randn(5, 2, 6, 8), randn(5, 4, 3, 4)
    z, report, finished = solver_on(recipe, most=4).solve(features, start, InterruptAt(4))
    assert not finished
    np.testing.assert_array_equal(report.steps, [8, 8, 4, 4, 0])
    assert np.isnan(report.objective[4])
    halfway = recipe_for(small_edge(), steps=4)
    expected, told, _ = solver_on(halfway, most=4).solve(features[2:4], start[2:4])
    np.testing.assert_array_equal(z[2:4], expected)
    np.testing.assert_array_equal(report.objective[2:4], told.objective)


@pytest.mark.parametrize("name", ["small", "conv1"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8"])
def test_rmle_takes_features_of_any_type(edges: dict[str, Network], name: str, dtype: str) -> None:
    """As they are, in any layout; to pixels, as float32 or bytes, in any layout."""
    edge = small_edge() if name == "small" else edges[name]
    recipe = recipe_for(edge, mean=(0.4,), std=(0.3,), tv_weight=1e-3, lr=0.05)
    solver, start = solver_on(recipe, most=2), randn(3, *recipe.input_shape)
    x, options = torch.from_numpy(3 * randn(3, *edge.output_shape)), {}
    if dtype in ("uint8", "int8"):
        x = (x * 8 + 60).to(getattr(torch, dtype))
        channels = edge.output_shape[0]
        options = {"scale": np.linspace(0.05, 0.1, channels), "zero_point": np.linspace(50, 70, channels)}
    x = x.to(getattr(torch, dtype)).transpose(2, 3).contiguous().transpose(2, 3)
    source = tensors.source(x, edge.output_shape, **options)
    z, told, _ = solver.solve(source.chunk(0, 3), start)
    pixels = np.clip(z * np.float32(0.3) + np.float32(0.4), 0, 1)
    out = np.empty((3, *recipe.input_shape), np.float32)
    report, finished = solver.solve_raw(source, start, out)
    assert finished
    assert relative(out, pixels) < 1e-5
    np.testing.assert_allclose(report.objective, told.objective, rtol=1e-5)
    small = np.empty((3, *recipe.input_shape[::-1]), np.uint8).transpose(0, 3, 2, 1)
    solver.solve_raw(source, start, small)
    np.testing.assert_array_equal(small, np.rint(out * 255))


def test_rmle_refuses_what_is_not_finite() -> None:
    recipe = recipe_for(small_edge())
    solver, start, x = solver_on(recipe, most=4), randn(2, 6, 8), randn(5, 4, 3, 4)
    out = np.empty((5, 2, 6, 8), np.float32)
    for value in (np.nan, np.inf):
        bad = x.copy()
        bad[3, 1, 2, 3] = value
        with np.errstate(invalid="ignore"):  # the interpreter's steps
            assert solver.solve_raw(tensors.source(bad, x.shape[1:]), start, out) is None
    assert solver.solve_raw(tensors.source(x.astype(np.float64), x.shape[1:]), start, out) is None  # converted first
    report, finished = solver.solve_raw(tensors.source(x, x.shape[1:]), start, out)
    assert finished
    assert np.isfinite(out).all()
    assert report.steps.tolist() == [2] * 5


def test_an_image_has_one_answer_in_any_batch() -> None:
    network = small_edge()
    x = randn(7, 2, 6, 8)
    whole = np.empty((7, 4, 3, 4), np.float32)
    network_on(network).run(x, whole)
    for most in (1, 2, 3):
        out = np.empty_like(whole)
        network_on(network, most=most).run(x, out)
        np.testing.assert_array_equal(out, whole)
    network_on(network).run(x[:0], whole[:0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_many_pieces_and_batches_give_what_one_gives(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch takes more pieces of pinned memory than there are at once; the last is not full."""
    count, most, piece = 35, 8, 16
    network, recipe = small_edge(), recipe_for(small_edge(), steps=1)
    start = randn(*recipe.input_shape)

    def results(batch: int) -> list[np.ndarray]:
        x, features = (randn(count, *shape).astype(dtype) for shape in (network.input_shape, network.output_shape))
        out, images = np.empty((count, *network.output_shape), np.float32), np.empty_like(x, np.float32)
        assert network_on(network, most=batch).run_raw(tensors.source(x, x.shape[1:]), out)
        found = solver_on(recipe, most=2 * batch).solve_raw(tensors.source(features, features.shape[1:]), start, images)
        assert found is not None
        return [out, images, found[0].objective]

    one = results(count)
    monkeypatch.setattr(cuda_host, "PIECE", piece)
    least = most * np.dtype(dtype).itemsize * min(np.prod(s) for s in (network.input_shape, network.output_shape))
    assert least > piece * _core.Upload.pieces * cuda_host.MOST_THREADS
    assert count > 4 * most
    for found, expected in zip(results(most), one, strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "uint8", "int8"])
def test_features_of_any_type(dtype: str) -> None:
    check_features(small_edge(), dtype)


def test_results_as_bytes() -> None:
    network = decoder("MNIST ReLU2")
    x = 3 * randn(2, *network.input_shape)
    out = np.empty((2, *network.output_shape), np.uint8)
    assert network_on(network).run_raw(tensors.source(x, network.input_shape), out)
    expected = np.rint(np.clip(reference(network, x), 0, 1) * 255)
    assert np.abs(out - expected).max() <= 1
    assert (out == expected).mean() > 0.99
    assert len(np.unique(out)) > 100


def test_what_is_not_finite_is_seen() -> None:
    network, out = small_edge(), np.empty((3, 4, 3, 4), np.float32)
    compiled = network_on(network, most=2)
    x = randn(3, 2, 6, 8)
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[2, 1, 3, 3] = value
        assert not compiled.run_raw(tensors.source(bad, network.input_shape), out)
    assert compiled.run_raw(tensors.source(x, network.input_shape), out)
    assert relative(out, reference(network, x)) < 1e-5


def test_tensors_on_the_device_stay_there() -> None:
    network = small_edge()
    compiled = network_on(network, most=2)
    x = torch.from_numpy(randn(5, 2, 6, 8)).to(DEVICE)
    y = compiled.run_there(x, "float32")
    assert y.device == x.device
    assert relative(y.cpu().numpy(), reference(network, x.cpu().numpy())) < 1e-5
    x[4, 0, 0, 0] = torch.nan
    with pytest.raises(FeatureError, match="NaN or Inf"):
        compiled.run_there(x, "float32")


def test_a_call_cut_short_leaves_nothing_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of features that are wrong it never tells."""
    compiled = network_on(small_edge())
    x = torch.from_numpy(randn(2, 2, 6, 8)).to(DEVICE)

    def stopped(device: torch.device) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cuda_network, "wait", stopped)
        with pytest.raises(KeyboardInterrupt):
            compiled.run_there(torch.full_like(x, torch.nan), "float32")
    assert torch.isfinite(compiled.run_there(x, "float32")).all()


@pytest.mark.parametrize(
    ("error", "twice"),
    [(KeyboardInterrupt("stop"), False), (KeyboardInterrupt("stop"), True), (RuntimeError("lost"), False)],
    ids=["Ctrl-C", "Ctrl-C, and again while it ends", "failed"],
)
def test_a_call_from_the_host_cut_short_leaves_nothing_to_the_next(
    error: BaseException, twice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not its results, and nothing of features that are wrong; of two slots both hold some, or one."""
    network = small_edge()
    compiled = network_on(network, most=2)
    x, out = randn(4, 2, 6, 8), np.empty((10, 4, 3, 4), np.float32)
    start, calls = compiled._stream._start, []

    def cut_short(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > 3:
            raise error
        start(*arguments)

    def again(device: torch.device) -> None:
        raise KeyboardInterrupt("stop")

    with monkeypatch.context() as patch:
        patch.setattr(compiled._stream, "_start", cut_short)
        if twice:
            patch.setattr(cuda_stream, "wait_for_all", again)
        with pytest.raises(type(error), match=str(error)):
            compiled.run(np.full((10, 2, 6, 8), np.nan, np.float32), out)
    for count in (2, 4):
        assert compiled.run_raw(tensors.source(x[:count], network.input_shape), out[:count])
        assert relative(out[:count], reference(network, x[:count])) < 1e-5


def test_a_gpu_is_given_large_batches(edges: dict[str, Network]) -> None:
    """What keeps two cores busy for a second would leave a GPU idle."""
    assert network_on(decoder("CIFAR ReLU22"), most=4096).batch_size == 65536
    assert solver_on(recipe_for(edges["ReLU22"], steps=500), most=4096).batch_size > 1000


def test_the_plan_is_told(triton_alone: None) -> None:
    plan = network_on(decoder("MNIST ReLU2")).describe()
    assert [row["op"] for row in plan] == ["conv_transpose2d", "conv_transpose2d"]
    assert [row["kernel"] for row in plan] == ["DirectConvolution", "DirectConvolution"]
    assert sum(row["flops"] for row in plan) == decoder("MNIST ReLU2").flops
    plan = network_on(decoder("CIFAR ReLU32")).describe()
    assert plan[0]["kernel"] == "Convolution 128x64x32, boxes"


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x.tanh(), x.relu()], 1)


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 3, 3), Branches()], ids=["writes the results", "two write one value"])
def test_every_launch_is_measured_on_request(layer: nn.Module) -> None:
    network = exported((16, 4, 4), layer)
    compiled = network_on(network, most=2)
    assert "seconds" not in compiled.describe()[0]
    plan = compiled.describe(measure=True)
    assert len(plan) == len(compiled.describe())
    assert all(row["seconds"] > 0 for row in plan)
    for row in plan:
        assert row["gflops"] == pytest.approx(row["flops"] / row["seconds"] / 1e9)
    x = randn(3, *network.input_shape)
    out = np.empty((3, *network.output_shape), np.float32)
    compiled.run(x, out)
    assert relative(out, reference(network, x)) < 1e-5
