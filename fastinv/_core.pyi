"""The compiled CPU engine of fastinv."""

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float32]
_Activation = tuple[int, float, float]
_Pair = tuple[int, int]

def available_threads() -> int: ...
def isas() -> list[tuple[str, bool]]: ...
def resolve_isa(name: str) -> str: ...
def fma_peak(isa: str, threads: int, seconds: float) -> float: ...

class Program:
    def __init__(self, isa: str, input: list[int], differentiable: bool) -> None: ...
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
    ) -> bool: ...
    def describe(self) -> list[str]: ...
    @property
    def isa(self) -> str: ...
    @property
    def block(self) -> int: ...
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
        tv_weight: float,
        tv_beta: float,
        tolerance: float,
        patience: int,
        keep_best: bool,
        low: list[float],
        high: list[float],
        threads: int,
    ) -> None: ...
    def solve(
        self, features: _Floats, init: _Floats
    ) -> tuple[_Floats, npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]: ...
    def describe(self) -> list[str]: ...
    @property
    def isa(self) -> str: ...
    @property
    def workspace_bytes(self) -> int: ...
