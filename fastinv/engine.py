"""`compile`: a network becomes an `Engine`, an rMLE recipe a `Solver`, on one backend."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from fastinv import tensors
from fastinv.backends import select
from fastinv.backends.base import CompiledNetwork, CompiledSolver, Progress, Report
from fastinv.errors import BackendError, FeatureError, Interrupted, NetworkError
from fastinv.inverters import RMLE, InverseNetwork, channelwise
from fastinv.network import Network
from fastinv.simplify import with_denormalisation

Array = npt.NDArray[np.float32]

# A chunk is what is converted, checked and run at once: enough for every thread, little enough to stop soon.
CHUNK_ELEMENTS = 2**23  # inputs and outputs together, 32 MiB of float32
CHUNK_FLOPS = 2**36  # for each thread
IMAGES_PER_THREAD = 4  # at least
STARTED_IMAGES = 4096  # at once, where their starts are made first
MAX_THREADS = 1024


class Engine:
    """A network compiled for one backend: `engine(x)` gives its outputs [N, *output_shape] for inputs
    [N, *input_shape], numpy or torch, any N >= 0; see `Engine.__call__`. Safe to call from several threads at once.

    Attributes:
        network: what it runs.
        backend: the backend's name: "cuda", "cpu", "torch".
        isa: the backend's instruction set.
        precision: what it computes in: float32 in an engine for bfloat16, too, where rounding gains nothing.
        batch_size: how many inputs it takes at once.
        empty_report: the report on no image.
    """

    def __init__(self, network: Network, backend: str, compiled: CompiledNetwork, threads: int | None = None) -> None:
        self.network = network
        self.backend = backend
        self.isa = compiled.isa
        self.precision = compiled.precision
        self.batch_size = compiled.batch_size or _batch_size(network, 1, threads)
        self.empty_report = Report(None, np.empty(0, np.int64), np.empty(0, np.bool_), backend, compiled.isa)
        self._compiled = compiled

    def __call__(self, x: Any, *, scale: Any = None, zero_point: Any = None) -> Any:
        """The network's outputs [N, *output_shape], float32, for inputs [N, *input_shape], any N >= 0.

        Args:
            x: a numpy array or a torch tensor on the CPU (the result is of the same kind): float32, float16,
                bfloat16, float64, or uint8 or int8 with `scale`, in any layout. The cuda engine takes floats on its
                own GPU, too, where the result then is.
            scale, zero_point: a quantised q stands for (q - zero_point) * scale; numbers, or one a channel.

        Raises:
            FeatureError: a wrong kind, shape, dtype or device, or NaN or Inf.
        """
        if scale is None and zero_point is None:
            result = self._compiled.run_plain(x, self.batch_size)
            if result is not None:
                return result
        source = tensors.source(x, self.network.input_shape, scale=scale, zero_point=zero_point)
        result, out = tensors.allocate((len(source), *self.network.output_shape), "float32", source.torch)
        for start, stop in tensors.chunks(len(source), self.batch_size):
            self._run(source, start, stop, out[start:stop])
        return result

    def run(
        self, source: tensors.Source, start: int, stop: int, out: npt.NDArray[Any], tell: Progress | None = None
    ) -> Report:
        """Write the results for rows start to stop into `out` [stop - start, ...], float32 or uint8, in any layout."""
        self._run(source, start, stop, out)
        count = stop - start
        return Report(None, np.ones(count, np.int64), np.ones(count, np.bool_), self.backend, self.isa)

    def run_there(self, x: Any, dtype: str) -> tuple[Any, Report]:
        """The results, float32 or uint8, for a batch on the backend's own GPU, as `tensors.features_there` gives it.

        They stay on the GPU. Only the cuda backend has this.
        """
        compiled: Any = self._compiled
        count = len(x)
        report = Report(None, np.ones(count, np.int64), np.ones(count, np.bool_), self.backend, self.isa)
        return compiled.run_there(x, dtype), report

    def _run(self, source: tensors.Source, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        if not self._compiled.run_raw(source.rows(start, stop), out):
            # What the backend cannot take as it is, or refuses: then this raises.
            values = source.chunk(start, stop)
            with tensors.staged(out) as part:
                self._compiled.run(values, part)

    def describe(self, measure: bool = False) -> list[dict[str, Any]]:
        """The plan, one entry for each kernel launch.

        Each has `step` (its number in the network; of several that go in one launch the last), `op`, `source` (where
        it comes from), `kernel` (algorithm and register tile), `activation`, `output` (shape), and for one image
        `flops` (of the direct form, whatever the algorithm; 0 for launches that only move data) and `bytes` (weights,
        inputs and outputs, each once). The cpu backend adds `images` (that a thread takes through all layers at once),
        `split` (what threads share out) and `strips` (that an image is cut into, each to go through all layers before
        the next, where threads do not share the image).

        Args:
            measure: time every launch: adds `seconds` and `gflops` (10^9 direct-form FLOPs a second), for one image.
                The cpu backend does that on one thread, for a tenth of a second in all; the cuda backend in a large
                batch, on the device, without the transfers, for features of the type that it computes in.
        """
        return self._compiled.describe(measure)

    def __repr__(self) -> str:
        shapes = f"{list(self.network.input_shape)} -> {list(self.network.output_shape)}"
        return f"Engine({shapes}, {self.backend}, {self.isa}, {self.precision})"


class Solver:
    """An rMLE recipe compiled for one backend. Safe to call from several threads at once.

    Attributes:
        recipe: what it solves.
        backend, isa, precision, empty_report: as of an `Engine`.
        batch_size: how many images' features it takes at once.
    """

    def __init__(self, recipe: RMLE, backend: str, compiled: CompiledSolver, threads: int | None = None) -> None:
        self.recipe = recipe
        self.backend = backend
        self.isa = compiled.isa
        self.precision = compiled.precision
        passes = 0 if compiled.stops_within else 3 * max(1, recipe.steps)  # forward, backward by two
        self.batch_size = compiled.batch_size or _batch_size(recipe.edge, passes, threads)
        nothing = np.empty(0, np.float64), np.empty(0, np.int64), np.empty(0, np.bool_)
        self.empty_report = Report(*nothing, backend, compiled.isa)
        self._compiled = compiled
        self._mean = channelwise(recipe.mean, recipe.image_shape)
        self._std = channelwise(recipe.std, recipe.image_shape)
        self._normalises = bool((self._mean != 0.0).any() or (self._std != 1.0).any())
        self._constants: tuple[Any, ...] | None = None  # always the same: by the start's kind
        self._init: Array | Engine
        if isinstance(recipe.init, InverseNetwork):
            pixels = with_denormalisation(recipe.init.network, recipe.init.mean, recipe.init.std)
            self._init = compile(pixels, backend, "float32", threads)
            self.batch_size = min(self.batch_size, STARTED_IMAGES)
        else:
            self._init = self._start(recipe.init, 1)

    def solve(
        self,
        features: Any,
        init: Any = None,
        *,
        scale: Any = None,
        zero_point: Any = None,
        progress: bool | Progress = False,
    ) -> tuple[Any, Report]:
        """Images [N, C, H, W], pixels in [0, 1], of features [N, *feature_shape], with a report on each.

        Args:
            features: as an `Engine` takes them; the images are of the same kind.
            init: the start in pixels: a number, [C, H, W], or [N, C, H, W]; None: the recipe's.
            scale, zero_point: of quantised features.
            progress: as of `invert`.

        Raises:
            FeatureError: features or a start of a wrong kind, shape, dtype or device, or with NaN or Inf.
            Interrupted: Ctrl-C; with what was done by then.
        """
        source = tensors.source(features, self.recipe.feature_shape, scale=scale, zero_point=zero_point)
        starts = self._init if init is None else self._start(init, len(source))

        def run(source: tensors.Source, start: int, stop: int, out: npt.NDArray[Any], tell: Progress | None) -> Report:
            own = starts
            if not isinstance(starts, Engine) and starts.ndim > len(self.recipe.image_shape):
                own = starts[start:stop]
            return self._solve(source, start, stop, out, own, tell)

        result, out = tensors.allocate((len(source), *self.recipe.image_shape), "float32", source.torch)
        return result, sweep(run, self.empty_report, source, result, out, self.batch_size, progress)

    def run(
        self, source: tensors.Source, start: int, stop: int, out: npt.NDArray[Any], tell: Progress | None = None
    ) -> Report:
        """Write the images for rows start to stop into `out` [stop - start, ...], float32 or uint8, in any layout.

        After Ctrl-C `Interrupted` has those begun, and the report on them.
        """
        return self._solve(source, start, stop, out, self._init, tell)

    def run_there(self, x: Any, dtype: str) -> tuple[Any, Report]:
        """As of an `Engine`. Ctrl-C raises `Interrupted` with the images begun, on the GPU."""
        if isinstance(self._init, Engine):
            start = self._start_there(x)
        else:
            (start,) = self._there(x.device, self._init)
        compiled: Any = self._compiled
        images, report, finished = compiled.solve_there(x, start, dtype)
        if not finished:
            raise Interrupted(images, _begun(report), report)
        return images, report

    def _solve(
        self,
        source: tensors.Source,
        start: int,
        stop: int,
        out: npt.NDArray[Any],
        init: Array | Engine,
        tell: Progress | None,
    ) -> Report:
        first = self._start_there if isinstance(init, Engine) else init
        found = self._compiled.solve_raw(source.rows(start, stop), first, out, tell)
        if found is not None:
            report, finished = found
        else:  # what the backend cannot take as it is, or refuses: then this raises
            features = source.chunk(start, stop, self._compiled.finite)
            if isinstance(init, Engine):
                init = self._start(init(features), len(features))
            z, report, finished = self._compiled.solve(features, init, tell)
            begun = len(z) if finished else _begun(report)
            self._write_pixels(z[:begun], out[:begun])
        if not finished:
            raise Interrupted(out, _begun(report), report)
        return report

    def _start_there(self, features: Any) -> Any:
        """Normalised starts from the inverse network, for features on the backend's own GPU; they are there, too."""
        assert isinstance(self._init, Engine)
        mean, std = self._there(features.device, self._mean, self._std)
        return (self._init.run_there(features, "float32")[0] - mean) / std

    def _there(self, device: Any, *constants: Array) -> tuple[Any, ...]:
        """Constants of the recipe on the backend's own GPU: brought there once, for each such copy is waited for."""
        import torch

        if self._constants is None:
            with torch.inference_mode(False):
                self._constants = tuple(torch.from_numpy(np.array(values)).to(device) for values in constants)
        return self._constants

    def _write_pixels(self, z: Array, out: npt.NDArray[Any]) -> None:
        # The objective tells of an image that diverged.
        with tensors.staged(out) as part, np.errstate(over="ignore", invalid="ignore"):
            pixels = np.add(np.multiply(z, self._std, out=part), self._mean, out=part) if self._normalises else z
            # NaN becomes 0; clip() takes longer for a small image.
            np.minimum(np.fmax(pixels, 0.0, out=part), 1.0, out=part)

    def _start(self, init: Any, count: int) -> Array:
        """A start in pixels as normalised float32 [C, H, W] or [count, C, H, W]."""
        shape = self.recipe.image_shape
        pixels = tensors.start_pixels(init, shape, (count, *shape))
        with np.errstate(over="ignore"):
            start: Array = ((pixels - self._mean) / self._std).astype(np.float32, order="C")
        if not np.isfinite(start).all():
            raise FeatureError("init holds NaN, Inf or numbers too large; expected pixels")
        return start

    def __repr__(self) -> str:
        recipe = self.recipe
        shapes = f"{list(recipe.feature_shape)} -> {list(recipe.image_shape)}"
        return f"Solver({shapes}, {recipe.optimizer}, {self.backend}, {self.isa}, {self.precision})"


@overload
def compile(
    what: Network | InverseNetwork, backend: str | None = ..., precision: str = ..., threads: int | None = ...
) -> Engine: ...
@overload
def compile(what: RMLE, backend: str | None = ..., precision: str = ..., threads: int | None = ...) -> Solver: ...
def compile(
    what: Network | InverseNetwork | RMLE,
    backend: str | None = "auto",
    precision: str = "float32",
    threads: int | None = None,
) -> Engine | Solver:
    """Compile a network or an inverse network into an `Engine`, an rMLE recipe into a `Solver`.

    An inverse network's engine gives what the network gives, normalised images; `invert` gives pixels.

    Args:
        what: the network or inverter.
        backend: a name, which then runs or is refused; "auto": the one that the environment variable
            FASTINV_BACKEND names, else the first that can run it.
        precision: "float32", "bfloat16" or another that the backend knows; "auto": the fastest exact enough.
        threads: how many to use; None: one for each core this process may use.

    Raises:
        BackendError: the backend, precision or number of threads cannot be had here.
        NetworkError: `what` is nothing that can be compiled.
    """
    if not isinstance(what, (Network, InverseNetwork, RMLE)):
        raise NetworkError(
            f"compile: a {type(what).__name__}, expected a Network, an InverseNetwork or an RMLE: "
            "export a module first, with fastinv.export(module, example)"
        )
    expect_choice(backend, precision, threads)
    threads = None if threads is None else int(threads)
    if isinstance(what, RMLE):
        chosen, precision = select(backend, precision, what.edge.steps, solver=True, method=what.method)
        return Solver(what, chosen.name, chosen.compile_solver(what, precision, threads), threads)
    network = what.network if isinstance(what, InverseNetwork) else what
    chosen, precision = select(backend, precision, network.steps)
    return Engine(network, chosen.name, chosen.compile(network, precision, threads), threads)


def expect_choice(backend: Any, precision: Any, threads: Any) -> None:
    """Raise BackendError where these are no names and no number of threads, whatever can be had here."""
    if not (backend is None or isinstance(backend, str)):
        raise BackendError(f"backend {backend!r:.40}, expected a name such as 'cpu', or None")
    if not isinstance(precision, str):
        raise BackendError(f"precision {precision!r:.40}, expected a name such as 'float32'")
    if threads is not None and not (tensors.is_whole(threads) and 1 <= threads <= MAX_THREADS):
        raise BackendError(
            f"threads {threads!r:.40}, expected an integer from 1 to {MAX_THREADS}, or None for all cores"
        )


def sweep(
    run: Callable[[tensors.Source, int, int, npt.NDArray[Any], Progress | None], Report],
    empty_report: Report,
    source: tensors.Source,
    images: Any,
    out: npt.NDArray[Any],
    batch_size: int,
    progress: bool | Progress = False,
) -> Report:
    """Run a batch chunk by chunk into `out` [N, ...].

    Args:
        run: takes the batch, the first and the last image of a chunk, where their results go, and what to tell.
        empty_report: what there is to report of no images.
        source: the batch.
        images: what the caller gets, in the memory of `out`.
        out: float32, or uint8 for 255 times the result, rounded (NaN becomes 0); in any layout.
        batch_size: images in a chunk.
        progress: as of `invert`.

    Raises:
        Interrupted: Ctrl-C; with what was done by then.
    """
    reports: list[Report] = []
    done = steps = 0
    with _progress(len(source), progress) as tell:

        def tell_within(images: int, more: int) -> None:
            assert tell is not None
            tell(done + images, steps + more)

        try:
            for start, stop in tensors.chunks(len(source), batch_size):
                reports.append(run(source, start, stop, out[start:stop], tell and tell_within))
                done = stop
                if tell is not None:
                    steps += int(reports[-1].steps.sum())
                    tell(done, steps)
        except KeyboardInterrupt as stopped:
            begun = done
            if isinstance(stopped, Interrupted):  # within a chunk, whose report it has
                reports.append(stopped.report)
                begun += stopped.begun
            report = _join(reports or [empty_report])
            raise Interrupted(images, begun, _filled(report, len(source) - len(report.steps))) from None
    return _join(reports or [empty_report])


@contextmanager
def _progress(total: int, progress: bool | Progress) -> Iterator[Progress | None]:
    """What is told of images and steps: the caller's function, a progress bar, or None."""
    if callable(progress) or not progress:
        yield progress or None
        return
    from tqdm import tqdm

    since = time.perf_counter()
    with tqdm(total=total, unit="image", desc="invert") as bar:

        def show(images: int, steps: int) -> None:
            if steps > images:
                rate = steps / (time.perf_counter() - since)
                bar.set_postfix_str(f"{rate:,.0f} steps/s", refresh=False)
            bar.update(images - bar.n)
            bar.refresh()

        yield show


def _batch_size(network: Network, passes: int, threads: int | None) -> int:
    workers = threads or len(os.sched_getaffinity(0))
    elements = sum(np.prod(shape, dtype=np.int64) for shape in (network.input_shape, network.output_shape))
    by_work = CHUNK_FLOPS * workers // max(1, network.flops * passes)
    return int(max(IMAGES_PER_THREAD * workers, min(CHUNK_ELEMENTS // elements, by_work)))


def _begun(report: Report) -> int:
    """The images that rMLE began with, the first ones."""
    assert report.objective is not None
    return int(((report.steps > 0) | ~np.isnan(report.objective)).sum())


def _filled(report: Report, count: int) -> Report:
    """The report, and on so many images more that were not begun."""
    objective = None if report.objective is None else np.full(count, np.nan)
    rest = Report(objective, np.zeros(count, np.int64), np.zeros(count, np.bool_), report.backend, report.isa)
    return _join([report, rest])


def _join(reports: Sequence[Report]) -> Report:
    first = reports[0]
    if len(reports) == 1:
        return first
    objectives = [report.objective for report in reports if report.objective is not None]
    return Report(
        np.concatenate(objectives) if objectives else None,
        np.concatenate([report.steps for report in reports]),
        np.concatenate([report.converged for report in reports]),
        first.backend,
        first.isa,
    )
