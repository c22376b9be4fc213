"""Kernels in CUDA C++; there only where nvcc was at the build."""

def check_device(device: int) -> None: ...

class Descent:
    z: int
    first: int
    second: int
    largest: int
    rates: int
    low: int
    high: int
    running: int
    taken: int
    images: int
    height: int
    width: int
    channels: int
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
    room: int
    def __init__(self) -> None: ...

class QuadraticForm:
    constant: int
    weight: int
    row_kind: int
    column_kind: int
    taps_y: int
    taps_x: int
    row_kinds: int
    column_kinds: int
    def __init__(self) -> None: ...
    def fits(self, descent: Descent) -> bool: ...
    def run(self, descent: Descent, device: int, stream: int) -> None: ...

class BandedForm:
    constant: int
    weights: int
    kind: int
    first: int
    taps: int
    factors: int
    kinds: int
    scale: float
    unscale: float
    def __init__(self) -> None: ...
    def fits(self, descent: Descent) -> bool: ...
    def run(self, descent: Descent, device: int, stream: int) -> None: ...

class PooledLayers:
    target: int
    weights: int
    first_bias: int
    second_bias: int
    first_scale: float
    second_scale: float
    first_gain: float
    second_gain: float
    second_offset: float
    back_gain: float
    def __init__(self) -> None: ...
    def fits(self, descent: Descent) -> bool: ...
    def run(self, descent: Descent, device: int, stream: int) -> None: ...

class Tail:
    x: int
    first: int
    last: int
    bias: int
    last_bias: int
    out: int
    flag: int
    images: int
    height: int
    width: int
    inputs: int
    outputs: int
    channels_last: int
    float16: int
    out_n: int
    out_c: int
    out_y: int
    out_x: int
    result: int
    slope: float
    finish: int
    a: float
    b: float
    def __init__(self) -> None: ...
    def fits(self) -> bool: ...
    def run(self, device: int, stream: int) -> None: ...

class WindowLayer:
    x: int
    weights: int
    bias: int
    addend: int
    out: int
    images: int
    height: int
    width: int
    inputs: int
    outputs: int
    phases: int
    float16: int
    finish: int
    a: float
    b: float
    def __init__(self) -> None: ...
    def fits(self) -> bool: ...
    def run(self, device: int, stream: int) -> None: ...

class HalvedLayer:
    x: int
    weights: int
    bias: int
    addend: int
    saved: int
    out: int
    images: int
    height: int
    width: int
    x_pitch: int
    out_pitch: int
    outputs: int
    unscale: float
    finish: int
    a: float
    b: float
    def __init__(self) -> None: ...
    def fits(self) -> bool: ...
    def run(self, device: int, stream: int) -> None: ...

class SmallTail:
    x: int
    weights: int
    out: int
    flag: int
    images: int
    channels_last: int
    given: int
    result: int
    slope: float
    finish: int
    a: float
    b: float
    def __init__(self) -> None: ...
    def fits(self) -> bool: ...
    def run(self, device: int, stream: int) -> None: ...

class PlanarLayer:
    x: int
    weights: int
    bias: int
    out: int
    flag: int
    images: int
    height: int
    width: int
    outputs: int
    float16: int
    room: int
    out_n: int
    out_c: int
    out_y: int
    out_x: int
    result: int
    finish: int
    a: float
    b: float
    def __init__(self) -> None: ...
    def fits(self) -> bool: ...
    def run(self, device: int, stream: int) -> None: ...
