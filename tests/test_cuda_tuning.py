"""Tiles by measurement, with a clock that is made up: what is chosen, kept, found again, and ignored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checks import exported, randn, reference, relative
from torch import nn

pytest.importorskip("triton", reason="Triton is not installed: it is there for Linux on x86-64 and ARM64 only")

from fastinv.kernels.triton import launch
from fastinv.kernels.triton.launch import Launch
from interpreter import DEVICE, forward
from triton.runtime.errors import OutOfResources

from fastinv.backends.cuda import CudaBackend
from fastinv.backends.cuda import device as cuda_device
from fastinv.backends.cuda import tuning as cuda_tuning
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.backends.cuda.tuning import Measured, read_measured, tiles_file, tune, write_measured
from fastinv.cli import main
from fastinv.errors import BackendError
from fastinv.inverters import RMLE, InverseNetwork


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own cache folder, and a GPU's name for the device of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_tuning, "gpu_name", lambda device: "GPU X")
    return tmp_path / "fastinv"


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return exported((16, 4, 4), nn.Conv2d(16, 40, 3, padding=1), nn.ReLU())


def tile_of(network, precision: str = "float32"):
    return Lowering(network, DEVICE, PRECISIONS[precision]).nodes[0].kernel.tile


def rows(launch) -> int:
    """Of a tile, whose pixels may be a box."""
    constants = launch.constants
    return constants["BI"] * constants["BY"] * constants["BX"] if "BI" in constants else constants["BM"]


def few_rows(launch) -> float:
    """A clock by which tiles of 64 rows are fast."""
    return rows(launch)


def measure(network, timer=few_rows, **options):
    return tune(network, "float32", torch.device(DEVICE), timer=timer, **options).tiles


def test_the_fastest_is_kept_and_found_again(network, folder: Path) -> None:
    before = tile_of(network)
    found = measure(network)
    assert [tile[0] for tile in found.values()] == [64]
    assert read_measured().tiles == found
    after = tile_of(network)
    assert (before.m, after.m, after.k) == (128, 64, before.k)
    assert tile_of(network, "tf32") == before  # measured for another precision
    x = randn(2, 16, 4, 4)
    assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5
    assert [path.name for path in folder.iterdir()] == ["tiles.json"]


def test_every_candidate_gives_the_result(network) -> None:
    x = randn(2, 16, 4, 4)
    kernel = Lowering(network, DEVICE, PRECISIONS["float32"]).nodes[0].kernel
    assert 3 <= len(set(kernel.candidates)) <= 5
    for wanted in kernel.candidates:
        measure(network, lambda launch, wanted=wanted: _numbers(launch) != wanted.numbers)
        assert tile_of(network) == wanted
        assert relative(forward(network, x, "float32"), reference(network, x)) < 1e-5


def _numbers(launch) -> tuple[int, ...]:
    tile = rows(launch), launch.constants["BN"], launch.constants["BK"], launch.warps, launch.stages
    return (*tile, int("BI" in launch.constants), int(launch.constants.get("LASTING", False)))


def test_equal_times_leave_the_tile_as_it_is(network) -> None:
    before = tile_of(network)
    measure(network, lambda launch: 1.0)
    assert tile_of(network) == before


def test_what_does_not_fit_is_not_chosen(network) -> None:
    def timer(launch) -> float:
        if rows(launch) == 64:
            raise OutOfResources(300000, 232448, "shared memory")
        return 1 - launch.constants.get("LASTING", False)

    (found,) = measure(network, timer).values()
    assert found == [*tile_of(network).numbers[:5], 1, 1]
    assert found[0] == 128


def test_ways_back_are_measured_for_solvers(network) -> None:
    assert len(measure(network)) == 1
    assert len(measure(network, differentiable=True)) == 2


def test_two_layers_in_one_launch_are_measured_as_one() -> None:
    layers = nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)
    network = exported((16, 16, 16), *layers)
    to = Lowering(network, DEVICE, PRECISIONS["float16"])
    assert [type(node.kernel).__name__ for node in to.nodes] == ["Pair"]
    found = tune(network, "float16", torch.device(DEVICE), timer=lambda launch: launch.stages).tiles
    assert [tile[4] for tile in found.values()] == [2]
    assert tile_of(network, "float16").stages == 2
    x = randn(2, 16, 16, 16)
    assert relative(forward(network, x, "float16"), reference(network, x)) < 5e-3


@pytest.mark.parametrize(
    ("layers", "image", "precision", "native"),
    [
        ([nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(1)], (64, 4, 16), "float16", "WindowConvolution"),
        ([nn.Conv2d(64, 64, 3, padding=1), nn.MaxPool2d(1)], (64, 4, 16), "float32", "HalvedConvolution"),
        (
            [nn.ConvTranspose2d(64, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 3, 3, padding=1)],
            (64, 16, 16),
            "float16",
            "Tail",
        ),
        ([nn.Conv2d(64, 3, 3, padding=1)], (64, 4, 4), "float16", "PlanarConvolution"),
    ],
)
def test_a_kernel_in_cuda_gives_way_where_it_is_slower(
    layers: list[nn.Module], image: tuple[int, ...], precision: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("fastinv._cuda", reason="the kernels in CUDA C++ are not built: no nvcc, or FASTINV_CUDA=OFF")
    monkeypatch.setattr(launch, "processors", lambda device: 1)  # then no images are few
    network = exported(image, *layers)

    def kernel_of() -> str:
        return type(Lowering(network, DEVICE, PRECISIONS[precision]).nodes[0].kernel).__name__

    for faster in (True, False, False, True):
        times = {True: 1.0 + faster, False: 1.5}  # of Triton's launches, and of others
        found = tune(network, precision, torch.device(DEVICE), timer=lambda way, t=times: t[isinstance(way, Launch)])
        assert list(found.native.values()) == [faster]
        assert (kernel_of() == native) is faster
        assert read_measured() == found


def test_a_launch_is_timed_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many in a graph, between two events: what Python takes to launch them does not count."""
    clock = [0.0]

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, end: Event) -> float:
            return end.at - self.at

    def launch() -> None:
        clock[0] += 3.0  # ms

    def graph_of(launches, device):
        assert len(launches) > 1
        return lambda: [launch() for launch in launches]

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(cuda_device, "repeatable", graph_of)
    assert cuda_device.seconds(launch, torch.device("cuda")) == pytest.approx(3e-3)
    assert 0 <= cuda_device.seconds(launch, torch.device("cpu")) < 1


@pytest.mark.parametrize("solves", [False, True])
def test_info_tunes(network, solves: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    inverter = RMLE(network, network.input_shape) if solves else InverseNetwork(network)
    inverter.save(tmp_path / "a.finv")
    monkeypatch.setattr(CudaBackend, "available", lambda self: None)
    monkeypatch.setattr(CudaBackend, "_device", lambda self: torch.empty(0, device=DEVICE).device)
    monkeypatch.setattr(cuda_tuning, "seconds", lambda launch, device: few_rows(launch))
    options = ["--backend", "cuda", "--precision", "tf32"]
    assert main(["info", str(tmp_path / "a.finv"), *options, "--tune"]) == 0
    assert "Convolution 64x" in capsys.readouterr().out
    assert len(read_measured().tiles) == 1 + solves
    assert tile_of(network, "tf32").m == 64


def test_another_gpu_has_tiles_of_its_own(network, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tile_of(network)
    measure(network)
    monkeypatch.setattr(cuda_tuning, "gpu_name", lambda device: "GPU Y")
    assert tile_of(network) == before
    assert len(read_measured().tiles | measure(network)) == 2
    assert len(read_measured().tiles) == 2  # the file keeps both


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"{}",
        b"\xff\xfe",
        b'{"version": 3, "tiles": {"a": [1, 2]}, "native": {}}',
        b'{"version": 3, "tiles": [3], "native": {}}',
        b'{"version": 3, "tiles": {}}',
        b'{"version": 3, "tiles": {}, "native": {"a": 1}}',
    ],
)
def test_a_broken_file_is_ignored(network, folder: Path, content: bytes) -> None:
    before = tile_of(network)
    folder.mkdir()
    tiles_file().write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"tiles\.json is ignored .*delete it"):
        assert tile_of(network) == before
    found = measure_quietly(network)
    assert read_measured().tiles == found


def measure_quietly(network):
    with pytest.warns(RuntimeWarning, match="is ignored"):
        return measure(network)


def test_tiles_that_are_no_candidates_are_ignored(network) -> None:
    before = tile_of(network)
    (key,) = measure(network)
    write_measured(Measured({key: [7, 16, 32, 4, 3, 0, 0]}))
    assert tile_of(network) == before


def test_a_file_of_another_version_is_none(folder: Path) -> None:
    folder.mkdir()
    tiles_file().write_text(json.dumps({"version": 0, "tiles": {"a": [1, 2, 3, 4, 5]}}))
    assert read_measured() == Measured()


def test_a_place_that_cannot_be_written_to_is_told(network, folder: Path) -> None:
    folder.write_text("in the way")
    with pytest.warns(RuntimeWarning, match="is ignored"), pytest.raises(BackendError, match="set XDG_CACHE_HOME"):
        measure(network)


def test_nothing_is_looked_up_without_a_gpu(network, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(network)
    monkeypatch.setattr(cuda_tuning, "gpu_name", lambda device: None)
    assert tile_of(network).m == 128
    assert len(read_measured().tiles) == 1
