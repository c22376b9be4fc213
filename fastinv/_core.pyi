"""The compiled CPU engine of fastinv."""

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Activation = tuple[int, float, float]
_Pair = tuple[int, int]

def available_threads() -> int: ...
def isas() -> list[tuple[str, bool]]: ...
def has_bfloat16(isa: str) -> bool: ...
def has_tiles(isa: str) -> bool: ...
def resolve_isa(name: str) -> str: ...
def vector_width(isa: str) -> int: ...
def fma_peak(isa: str, threads: int, seconds: float) -> float: ...
def copy(source: npt.NDArray[Any], target: npt.NDArray[Any], threads: int) -> None: ...

class Upload:
    pieces: ClassVar[int]
    def __init__(self, pinned: npt.NDArray[np.uint8], threads: int, driver: str, isa: str = ...) -> None: ...
    def send(
        self,
        source: npt.NDArray[Any],
        there: int,
        rounds: bool,
        stream: int,
        results: npt.NDArray[Any] | None = ...,
        out: npt.NDArray[Any] | None = ...,
    ) -> None: ...

class Program:
    @property
    def rounds(self) -> bool: ...
    def __init__(
        self, isa: str, input: list[int], differentiable: bool, abreast: bool = ..., bfloat16: bool = ...
    ) -> None: ...
    def convolution(
        self,
        input: int,
        weight: _Floats,
        bias: _Floats,
        output: list[int],
        stride: _Pair,
        padding: _Pair,
        dilation: _Pair,
        groups: int,
        transposed: bool,
        activation: _Activation,
        addend: int = ...,
    ) -> int: ...
    def linear(self, input: int, weight: _Floats, bias: _Floats, output: list[int], activation: _Activation) -> int: ...
    def max_pool(
        self,
        input: int,
        output: list[int],
        kernel: _Pair,
        stride: _Pair,
        padding: _Pair,
        dilation: _Pair,
        activation: _Activation,
    ) -> int: ...
    def resample(self, input: int, rows: _Floats, columns: _Floats, activation: _Activation) -> int: ...
    def gather(self, input: int, index: npt.NDArray[np.int32], output: list[int], activation: _Activation) -> int: ...
    def concat(self, inputs: list[int], axis: int, output: list[int], activation: _Activation) -> int: ...
    def add(self, a: int, b: int, output: list[int], activation: _Activation) -> int: ...
    def mul(self, a: int, b: int, output: list[int], activation: _Activation) -> int: ...
    def affine(self, input: int, scale: _Floats, shift: _Floats, activation: _Activation) -> int: ...
    def normalize(
        self,
        input: int,
        weight: _Floats,
        bias: _Floats,
        *,
        groups: int,
        spatial: bool,
        centered: bool,
        eps: float,
        activation: _Activation,
    ) -> int: ...
    def attention(
        self,
        q: int,
        k: int,
        v: int,
        bias: _Floats,
        *,
        windows: int,
        heads: int,
        scale: float,
        activation: _Activation,
    ) -> int: ...
    def matmul(self, a: int, b: int, *, groups: int, transposed: bool, activation: _Activation) -> int: ...
    def softmax(self, input: int) -> int: ...
    def activate(self, input: int, activation: _Activation) -> int: ...
    def finish(self, value: int) -> int: ...

class Engine:
    def __init__(self, program: Program, flops: int, threads: int) -> None: ...
    def run(
        self,
        x: npt.NDArray[np.float32 | np.float16 | np.uint16 | np.uint8 | np.int8],
        out: npt.NDArray[np.float32 | np.uint8],
        scale: _Floats = ...,
        zero_point: _Floats = ...,
        channels_last: bool = ...,
    ) -> bool: ...
    def run_plain(self, x: object, most: int) -> npt.NDArray[np.float32] | None: ...
    def describe(self) -> list[tuple[str, bool]]: ...
    def profile(self, seconds: float) -> list[float]: ...
    @property
    def isa(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def strips(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...

class Solver:
    def __init__(
        self,
        program: Program,
        *,
        optimizer: str,
        steps: int,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        momentum: float,
        cosine: bool,
        tv_weight: float,
        tv_beta: float,
        tolerance: float,
        patience: int,
        keep_best: bool,
        low: list[float],
        high: list[float],
        threads: int,
        block: int = 0,
    ) -> None: ...
    def solve(
        self, features: _Floats, init: _Floats, progress: Callable[[int, int], object] | None = None
    ) -> tuple[_Floats, npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_], bool]: ...
    def finite(self, features: _Floats) -> bool: ...
    def hessian(self) -> _Floats: ...
    def take_inverse(self, inverse: npt.NDArray[np.float64]) -> None: ...
    @property
    def quadratic(self) -> bool: ...
    def describe(self) -> list[tuple[str, bool]]: ...
    @property
    def isa(self) -> str: ...
    @property
    def block(self) -> int: ...
    @property
    def images_abreast(self) -> int: ...
    @property
    def workspace_bytes(self) -> int: ...
