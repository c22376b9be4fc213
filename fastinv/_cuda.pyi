"""Kernels in CUDA C++; there only where nvcc was at the build."""

class Descent:
    z: int
    constant: int
    first: int
    second: int
    largest: int
    weight: int
    row_kind: int
    column_kind: int
    rates: int
    low: int
    high: int
    running: int
    taken: int
    images: int
    height: int
    width: int
    channels: int
    taps_y: int
    taps_x: int
    row_kinds: int
    column_kinds: int
    steps: int
    most: int
    optimizer: int
    rest1: float
    beta2: float
    rest2: float
    eps: float
    momentum: float
    tv_weight: float
    half_beta: float
    root: float
    def __init__(self) -> None: ...
    def fits(self) -> bool: ...
    def run(self, device: int, stream: int) -> None: ...
