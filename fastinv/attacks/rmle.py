"""rMLE: regularised maximum likelihood estimation of the input (paper, Algorithm 1), in plain PyTorch.

This is the definition: compiled solvers are held to what it computes in float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastinv.backends.base import Report
from fastinv.errors import FeatureError, NetworkError
from fastinv.inverters import METHODS, solver_options, start_pixels
from fastinv.ops.base import Shape
from fastinv.tensors import is_shape, normalisation

# The paper's recipes by split point. λ and β are not fixed by it: β 2 is the published code's, λ was chosen on
# training images.
_SHALLOW = {"steps": 500, "lr": 1e-2, "tv_weight": 0.1, "tv_beta": 2.0, "init": 0.5, "clamp": None}
_DEEP = {**_SHALLOW, "steps": 5000, "lr": 1e-3}
PAPER_PRESETS: dict[str, dict[str, Any]] = {
    "conv1": _SHALLOW,
    "ReLU2": _DEEP,
    "conv11": _SHALLOW,
    "ReLU22": _DEEP,
    "ReLU32": _DEEP,
}


def total_variation(z: torch.Tensor, beta: float) -> torch.Tensor:
    """TV_β of every image: Σ over channels and pixels of (dy² + dx²)^{β/2}, with differences over the border 0.

    Args:
        z: [N, C, H, W].
        beta: >= 1. Below 2 the root has no gradient at 0, so 1e-12 is added to the sum of squares.

    Returns:
        [N].
    """
    dy = torch.zeros_like(z)
    dx = torch.zeros_like(z)
    dy[:, :, :-1] = z[:, :, 1:] - z[:, :, :-1]
    dx[..., :-1] = z[..., 1:] - z[..., :-1]
    squares = dy.square() + dx.square()
    if beta < 2:
        squares = squares + 1e-12
    return squares.pow(beta / 2).sum(dim=(1, 2, 3))


PAIRS = 10  # of iterates that L-BFGS remembers
FIRST_MOVE = 0.1  # of any element, in normalised units, while it has no idea of the scale
ARMIJO = 1e-4  # of the fall that the slope promises
TRIALS = 20  # along one direction
EXACT = 1e-6  # of the first residual
STALLED = 50  # steps without a new lowest residual: rounding is all that is left


@torch.enable_grad()
def rmle(
    edge: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    input_shape: Shape,
    *,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    steps: int = 500,
    lr: float = 1e-2,
    tv_weight: float = 0.1,
    tv_beta: float = 2.0,
    optimizer: str = "adam",
    init: Any = 0.5,
    clamp: tuple[float, float] | None = (0.0, 1.0),
    keep: str = "last",
    tolerance: float = 0.0,
    patience: int = 1,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    momentum: float = 0.0,
    schedule: str = "constant",
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Report]:
    """Minimise Σ(edge(z) − v)² + tv_weight · TV_β(z) for every image by itself.

    Args:
        edge: the edge f_θ1 or a shadow of it, in the dtype of `features`; normalised images to features.
        features: v, [N, ...]; its dtype is the one computed in.
        input_shape: [C, H, W].
        start: normalised z to start from, [C, H, W] or [N, C, H, W], instead of `init`.
        mean, std, steps, lr, tv_weight, tv_beta, optimizer, init, clamp, keep, tolerance, patience, betas, eps,
            momentum, schedule: as in `fastinv.RMLE`.

    Returns:
        The normalised images z [N, C, H, W] and a report; its objective is that of the returned iterate.

    Raises:
        NetworkError: options of a wrong type or out of range, or a start that does not fit.
        FeatureError: features that hold NaN or Inf, or are not what the edge gives.
    """
    solver_options(
        steps=steps,
        lr=lr,
        tv_weight=tv_weight,
        tv_beta=tv_beta,
        optimizer=optimizer,
        clamp=clamp,
        keep=keep,
        tolerance=tolerance,
        patience=patience,
        betas=betas,
        eps=eps,
        momentum=momentum,
        schedule=schedule,
    )
    if optimizer not in METHODS:
        raise NetworkError(f"rmle: optimizer {optimizer!r}, expected one of {', '.join(METHODS)}")
    if not is_shape(input_shape, 3):
        raise NetworkError(f"rmle: input_shape {input_shape!r:.80}, expected (C, H, W)")
    if optimizer == "exact" and (clamp is not None or (tv_weight > 0 and tv_beta != 2)):
        raise NetworkError(f"rmle: clamp {clamp}, tv_beta {tv_beta}; 'exact' needs None and 2, and an affine edge")
    if not isinstance(features, torch.Tensor) or features.ndim < 2 or not features.is_floating_point():
        raise FeatureError(f"rmle: features {features!r:.80}, expected a float tensor [N, ...]")
    if not bool(features.isfinite().all()):
        raise FeatureError("rmle: features hold NaN or Inf; drop or mend these images")
    count, dtype = len(features), features.dtype
    numbers = normalisation(mean, std, input_shape[0], NetworkError)
    means, stds = (torch.tensor(v, dtype=dtype).reshape(-1, 1, 1) for v in numbers)
    if start is None:
        start = (torch.from_numpy(start_pixels(init, tuple(input_shape))).to(dtype) - means) / stds
    try:
        z = start.to(dtype).expand(count, *input_shape).clone().requires_grad_(True)
    except RuntimeError as error:
        raise NetworkError(f"rmle: the start does not fit {count} images {list(input_shape)} ({error})") from None
    bounds = None if clamp is None else [(bound - means) / stds for bound in clamp]
    with torch.no_grad():
        seen = edge(z[:1])
    if seen.shape != features[:1].shape:
        raise FeatureError(f"rmle: features {list(features.shape[1:])}, but the edge gives {list(seen.shape[1:])}")

    if optimizer == "lbfgs":
        return _lbfgs(edge, features, z.detach(), tv_weight, tv_beta, bounds, steps, tolerance, patience)
    if optimizer == "exact":
        return _exact(edge, features, z.detach(), tv_weight, steps)
    if optimizer == "sgd":
        optim: torch.optim.Optimizer = torch.optim.SGD([z], lr=lr, momentum=momentum)
    else:
        optim = torch.optim.Adam([z], lr=lr, betas=betas, eps=eps, amsgrad=optimizer == "amsgrad")

    active = torch.ones(count, dtype=torch.bool)  # images that have not converged
    taken = torch.zeros(count, dtype=torch.int64)
    calm = torch.zeros(count, dtype=torch.int64)  # evaluations in a row within the tolerance
    before = torch.zeros(count, dtype=dtype)
    best_value = torch.full((count,), torch.inf, dtype=dtype)
    best = z.detach().clone()
    for step in range(steps + 1):
        value = (edge(z) - features).flatten(1).square().sum(dim=1)
        if tv_weight > 0:
            value = value + tv_weight * total_variation(z, tv_beta)
        found = value.detach()
        better = active & (found < best_value)
        best_value = torch.where(better, found, best_value)
        best[better] = z.detach()[better]
        if tolerance > 0 and step > 0:
            calm = torch.where((found - before).abs() <= tolerance * before.abs(), calm + 1, 0)
            active &= calm < patience
        before = torch.where(active | (taken == step), found, before)
        if step == steps or not active.any():
            break
        (z.grad,) = torch.autograd.grad(value.sum(), [z])  # images are independent: each gets its own gradient
        frozen = z.detach()[~active].clone()
        if schedule == "cosine":
            optim.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optim.step()
        with torch.no_grad():
            if bounds is not None:
                z.copy_(torch.minimum(torch.maximum(z, bounds[0]), bounds[1]))
            z[~active] = frozen
        taken += active
    last = z.detach()
    report = Report(
        objective=(best_value if keep == "best" else before).double().numpy(),
        steps=taken.numpy(),
        converged=(~active).numpy(),
        backend="torch",
        isa="torch",
    )
    return (best if keep == "best" else last), report


def _lbfgs(
    edge: Callable[[torch.Tensor], torch.Tensor],
    features: torch.Tensor,
    start: torch.Tensor,
    tv_weight: float,
    tv_beta: float,
    bounds: Sequence[torch.Tensor] | None,
    steps: int,
    tolerance: float,
    patience: int,
) -> tuple[torch.Tensor, Report]:
    """Limited-memory BFGS (Nocedal 1980), image by image: a step is one that makes the objective fall enough.

    Elements at a bound whose gradient points out of it stand still; steps along the direction of the others are cut
    back to the bounds (Bertsekas 1982). An image is done when no such step is left, or by the tolerance.
    """

    def evaluate(z: torch.Tensor, feature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z = z.detach().requires_grad_(True)
        value = (edge(z[None])[0] - feature).square().sum()
        if tv_weight > 0:
            value = value + tv_weight * total_variation(z[None], tv_beta)[0]
        (gradient,) = torch.autograd.grad(value, [z])
        return value.detach(), gradient

    def inside(z: torch.Tensor) -> torch.Tensor:
        return z if bounds is None else torch.minimum(torch.maximum(z, bounds[0]), bounds[1])

    def dot(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a.double() * b.double()).sum())

    def direction(z: torch.Tensor, gradient: torch.Tensor, pairs: Sequence[Any]) -> torch.Tensor:
        free = torch.ones_like(z, dtype=torch.bool)
        if bounds is not None:
            free = ~((z <= bounds[0]) & (gradient > 0) | (z >= bounds[1]) & (gradient < 0))
        d = torch.where(free, -gradient, 0)
        if not pairs:
            return d * (FIRST_MOVE / d.abs().max().clamp(min=1e-30))
        weights = []
        for move, change in reversed(pairs):
            weights.append(dot(move, d) / dot(move, change))
            d = d - weights[-1] * change
        move, change = pairs[-1]
        d = d * (dot(move, change) / dot(change, change))
        for (move, change), weight in zip(pairs, reversed(weights), strict=True):
            d = d + (weight - dot(change, d) / dot(move, change)) * move
        return torch.where(free, d, 0)

    def search(
        z: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor, d: torch.Tensor, feature: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        slope, step = dot(gradient, d), 1.0
        for _ in range(TRIALS if slope < 0 else 0):
            trial = inside(z + step * d)
            found, gradient_there = evaluate(trial, feature)
            if found <= value + ARMIJO * min(dot(gradient, trial - z), 0) and found < value:
                return trial, found, gradient_there
            # The minimum of the parabola through what is known, where that makes sense; also of NaN, a tenth.
            excess = float(found - value) - slope * step
            parabola = -0.5 * slope * step**2 / excess if excess != 0 else math.inf
            step = min(parabola, 0.5 * step) if parabola > 0.1 * step else 0.1 * step
        return None

    images, objectives, taken, converged = [], [], [], []
    for z, feature in zip(start, features, strict=True):
        value, gradient = evaluate(z, feature)
        pairs: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=PAIRS)
        count = calm = 0
        while count < steps and calm < patience:
            d = direction(z, gradient, pairs)
            if pairs and dot(gradient, d) >= 0:
                pairs.clear()
                d = direction(z, gradient, pairs)
            found = search(z, value, gradient, d, feature)
            if found is None and pairs:  # what it knows leads nowhere
                pairs.clear()
                found = search(z, value, gradient, direction(z, gradient, pairs), feature)
            if found is None:
                calm = patience
                break
            move, change = found[0] - z, found[2] - gradient
            if dot(move, change) > 1e-10 * dot(change, change):  # else the curvature is none that can be used
                pairs.append((move, change))
            if tolerance > 0:
                calm = calm + 1 if abs(found[1] - value) <= tolerance * abs(value) else 0
            z, value, gradient = found
            count += 1
        images.append(z)
        objectives.append(float(value))
        taken.append(count)
        converged.append(calm >= patience)
    report = Report(
        np.asarray(objectives, np.float64),
        np.asarray(taken, np.int64),
        np.asarray(converged, np.bool_),
        "torch",
        "torch",
    )
    return torch.stack(images) if images else start, report


def _exact(
    edge: Callable[[torch.Tensor], torch.Tensor], features: torch.Tensor, z: torch.Tensor, tv_weight: float, steps: int
) -> tuple[torch.Tensor, Report]:
    """The minimum of a quadratic objective, by conjugate gradients (Hestenes and Stiefel 1952), image by image.

    The gradient is affine in z, 2·H·z + c. An image is done when its residual, the negative gradient, has shrunk by
    `EXACT`; in exact arithmetic that takes no more steps than there are pixels.
    """

    def objective(z: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        value = (edge(z) - features).flatten(1).square().sum(dim=1)
        return value + tv_weight * total_variation(z, 2.0) if tv_weight > 0 else value

    def gradient(z: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        z = z.detach().requires_grad_(True)
        (found,) = torch.autograd.grad(objective(z, features).sum(), [z])
        return found

    def dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a.double() * b.double()).flatten(1).sum(dim=1)

    def times(scale: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return scale.reshape(-1, 1, 1, 1).to(x.dtype) * x

    with torch.no_grad():
        at_zero = edge(torch.zeros_like(z))  # with these features c is 0, and the gradient is 2·H·z
    residual = -gradient(z, features)
    direction, before = residual.clone(), dot(residual, residual)
    goal, lowest = EXACT**2 * before, before.clone()
    idle = torch.zeros(len(z), dtype=torch.int64)  # steps without a new lowest residual
    taken = torch.zeros(len(z), dtype=torch.int64)
    for _ in range(steps):
        active = (before > goal) & (idle < STALLED)
        if not active.any():
            break
        length = dot(direction, direction).sqrt().clamp_min(1e-300)
        # Of a direction of the length of an image: near the end it is lost beside what it is a difference of.
        unit = z[0].numel() ** 0.5 / length
        image = times(1 / unit, gradient(times(unit, direction), at_zero))
        curvature = dot(direction, image)
        active &= curvature > 0
        step = torch.where(active, before / curvature, 0.0)
        z = z + times(step, direction)
        residual = residual - times(step, image)
        after = dot(residual, residual)
        direction = residual + times(torch.where(active, after / before, 0.0), direction)
        before = torch.where(active, after, before)
        idle = torch.where(before < lowest, 0, idle + 1)
        lowest = torch.minimum(lowest, before)
        taken += active
        if not active.any():
            break
    with torch.no_grad():
        value = objective(z, features)
    return z, Report(value.double().numpy(), taken.numpy(), (before <= goal).numpy(), backend="torch", isa="torch")
