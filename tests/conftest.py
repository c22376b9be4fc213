"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Where there is no GPU, Triton's kernels are interpreted: it has to know before anything imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# Many small products in the interpreter: OpenBLAS's threads would wait for each other longer than one takes alone.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import amx
import pytest
import samples
import torch
from checks import ISAS
from digits import write_idx
from hypothesis import settings

from fastinv.backends import BACKENDS

# The first example of a test may load torch, and tests run on machines that do other work, too: no deadlines.
settings.register_profile("fastinv", deadline=None)
settings.load_profile("fastinv")

# The tests' tensors are small: on a busy machine OpenMP's barriers would cost far more than a second thread gains.
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_tiles_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured on this machine decides nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


# Begun last, each of these ran for minutes beside nothing.
LONGEST = ("test_triton_ahead_of_time.py", "test_cuda_sanitized.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST)


AVAILABLE = [backend.name for backend in BACKENDS if backend.available() is None]


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same weights in every run: a value that happens to lie at a ReLU's kink has either derivative."""
    torch.manual_seed(0)


@pytest.fixture(params=AVAILABLE)
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend that runs here, by name."""
    return str(request.param)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set that runs here, by name, as the one that the cpu backend takes."""
    monkeypatch.setenv("FASTINV_ISA", request.param)
    return str(request.param)


@pytest.fixture(params=amx.PLACES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An instruction set whose kernels have tiles; of the portable ones no user is told."""
    amx.use(request.param, monkeypatch)
    return str(request.param)


@pytest.fixture
def finv(tmp_path: Path) -> Path:
    """An inverse network's file."""
    path = tmp_path / "inverse.finv"
    samples.inverse_network().save(path)
    return path


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of noise in MNIST's format."""
    folder = tmp_path_factory.mktemp("digits")
    write_idx(folder, 40, 10)
    return folder


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with `mnist/` and `cifar10/`: $FASTINV_TEST_DATA, or `shared/data` beside the checkout."""
    named = os.environ.get("FASTINV_TEST_DATA")
    folder = Path(named) if named else Path(__file__).parents[2] / "shared/data"
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}; set FASTINV_TEST_DATA to a folder with mnist/ and cifar10/")
    return folder
