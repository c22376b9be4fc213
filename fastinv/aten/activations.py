"""From aten calls to steps: activations, those that are sums and products of others among them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch

from fastinv.aten.arithmetic import add, linear_map, mul, neg, reciprocal, sub
from fastinv.aten.axes import split
from fastinv.aten.conversion import Conversion, Value, holds
from fastinv.aten.layers import along_channels
from fastinv.ops.activation import Activation
from fastinv.ops.base import MAX_FLOAT


def activation(kind: str, *defaults: float) -> Callable[..., Value]:
    def converter(to: Conversion, x: Value, *parameters: float) -> Value:
        given = (*parameters, *defaults[len(parameters) :])
        return to.emit(Activation(kind, *map(float, given)), [x])

    return converter


SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805  # Klambauer et al., 2017

relu = activation("relu")
softplus = activation("softplus", 1.0, 20.0)


def elu(to: Conversion, x: Value, alpha: float = 1.0, scale: float = 1.0, rate: float = 1.0) -> Value:
    """scale · (x above zero, alpha · (exp(rate · x) − 1) below)."""
    if alpha < 0 or rate <= 0:
        to.unsupported("elu with a negative alpha or input scale")
    y = relu(to, x) if alpha == 0 else to.emit(Activation("elu", float(alpha), float(rate)), [x])
    return y if scale == 1 else linear_map(to, y, scale, 0.0)


def selu(to: Conversion, x: Value) -> Value:
    return elu(to, x, SELU_ALPHA, SELU_SCALE)


def celu(to: Conversion, x: Value, alpha: float = 1.0) -> Value:
    return elu(to, x, alpha, 1.0, 1 / alpha)


def gelu(to: Conversion, x: Value, *, approximate: str = "none") -> Value:
    return to.emit(Activation("gelu" if approximate == "none" else "gelu_tanh"), [x])


def clamp(to: Conversion, x: Value, low: Any = None, high: Any = None) -> Value:
    if not all(v is None or isinstance(v, (int, float)) for v in (low, high)):
        to.unsupported("a clamp to tensors")
    bounds = (-MAX_FLOAT if low is None else low, MAX_FLOAT if high is None else high)
    return to.emit(Activation("clamp", *map(float, bounds)), [x])


def clamp_max(to: Conversion, x: Value, high: Any) -> Value:
    return clamp(to, x, None, high)


def hardsigmoid(to: Conversion, x: Value) -> Value:
    return to.emit(Activation("hardtanh", 0.0, 1.0), [linear_map(to, x, 1 / 6, 0.5)])


def hardswish(to: Conversion, x: Value) -> Value:
    return mul(to, x, hardsigmoid(to, x))


def mish(to: Conversion, x: Value) -> Value:
    return mul(to, x, activation("tanh")(to, softplus(to, x)))


def log_sigmoid(to: Conversion, x: Value) -> Value:
    return neg(to, softplus(to, neg(to, x)))


def softshrink(to: Conversion, x: Value, bound: float = 0.5) -> Value:
    return sub(to, relu(to, sub(to, x, bound)), relu(to, sub(to, neg(to, x), bound)))


def prelu(to: Conversion, x: Value, slope: Any) -> Value:
    """a·x + (1 − a)·relu(x) with a slope for each channel; a leaky ReLU where all are the same."""
    if holds(slope, Value):
        to.unsupported("prelu with computed weights")
    if bool((slope == slope.flatten()[0]).all()):
        return to.emit(Activation("leaky_relu", float(slope.flatten()[0])), [x])
    slope = along_channels(to, x, slope.double())
    return add(to, linear_map(to, x, slope, 0.0), linear_map(to, relu(to, x), 1 - slope, 0.0))


def rrelu(to: Conversion, x: Value, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Value:
    if training:
        to.unsupported("rrelu in training mode")
    return to.emit(Activation("leaky_relu", (lower + upper) / 2), [x])


def absolute(to: Conversion, x: Value) -> Value:
    """relu(x) + relu(−x), whose gradient at 0 is 0, as PyTorch's: a constant start lies there."""
    return add(to, relu(to, x), relu(to, neg(to, x)))


def maximum(to: Conversion, a: Any, b: Any) -> Value:
    """a + relu(b − a); where both are equal a gets the gradient."""
    return add(to, a, relu(to, sub(to, b, a)))


def minimum(to: Conversion, a: Any, b: Any) -> Value:
    return sub(to, a, relu(to, sub(to, a, b)))


def square(to: Conversion, x: Value) -> Value:
    return mul(to, x, x)


exp, sqrt = activation("exp"), activation("sqrt")


def rsqrt(to: Conversion, x: Value) -> Value:
    return reciprocal(to, sqrt(to, x))


def power(to: Conversion, x: Value, exponent: Any) -> Value:
    """Products of squares and roots, down to the fourth."""
    quarters = None if isinstance(exponent, Value) else 4 * float(exponent)
    if not isinstance(x, Value) or quarters not in QUARTERS:
        to.unsupported("a power other than quarters up to 4")
    if quarters < 0:
        return reciprocal(to, power(to, x, -exponent))
    factor, rest, roots = x, int(quarters), 2
    while roots and rest % 2 == 0:
        rest, roots = rest // 2, roots - 1
    for _ in range(roots):
        factor = sqrt(to, factor)
    factors = []
    while rest:
        if rest % 2:
            factors.append(factor)
        rest //= 2
        factor = square(to, factor) if rest else factor
    return reduce(lambda a, b: mul(to, a, b), factors)


QUARTERS = frozenset(float(k) for k in range(-16, 17) if k)


def of_a_number(to: Conversion, base: float, x: Value) -> Value:
    """base ** x"""
    if not base > 0:
        to.unsupported("a power of a number that is not positive")
    return exp(to, linear_map(to, x, math.log(float(base)), 0.0))


def glu(to: Conversion, x: Value, axis: int = -1) -> Value:
    a, b = split(torch.chunk)(to, x, 2, axis)
    return mul(to, a, activation("sigmoid")(to, b))


IN_PLACE: dict[str, Callable[..., Value]] = {  # those that PyTorch also has with an underscore
    "relu": relu,
    "relu6": activation("hardtanh", 0.0, 6.0),
    "hardtanh": activation("hardtanh", -1.0, 1.0),
    "leaky_relu": activation("leaky_relu", 0.01),
    "sigmoid": activation("sigmoid"),
    "tanh": activation("tanh"),
    "silu": activation("silu"),
    "gelu": gelu,
    "elu": elu,
    "selu": selu,
    "celu": celu,
    "clamp": clamp,
    "clamp_min": clamp,
    "clamp_max": clamp_max,
    "hardsigmoid": hardsigmoid,
    "hardswish": hardswish,
    "mish": mish,
    "rrelu": rrelu,
    "abs": absolute,
    "square": square,
    "exp": exp,
    "sqrt": sqrt,
    "rsqrt": rsqrt,
    "reciprocal": reciprocal,
}

ACTIVATIONS: dict[str, Callable[..., Value]] = {
    **{f"aten.{name}{end}.default": converter for name, converter in IN_PLACE.items() for end in ("", "_")},
    "aten.softplus.default": softplus,
    "aten.log_sigmoid.default": log_sigmoid,
    "aten.softshrink.default": softshrink,
    "aten.prelu.default": prelu,
    "aten.maximum.default": maximum,
    "aten.minimum.default": minimum,
    "aten.max.other": maximum,
    "aten.min.other": minimum,
    "aten.pow.Tensor_Scalar": power,
    "aten.pow_.Scalar": power,
    "aten.pow.Scalar": of_a_number,
    "aten.exp2.default": lambda to, x: of_a_number(to, 2, x),
    "aten.glu.default": glu,
}
