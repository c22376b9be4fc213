"""rMLE: regularised maximum likelihood estimation of the input (paper, Algorithm 1), in plain PyTorch.

This is the definition: compiled solvers are held to what it computes in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastinv.backends.base import Report
from fastinv.errors import FeatureError, NetworkError
from fastinv.inverters import KEEP, OPTIMIZERS
from fastinv.ops.base import Shape

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
    start: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Report]:
    """Minimise Σ(edge(z) − v)² + tv_weight · TV_β(z) for every image by itself.

    Args:
        edge: the edge f_θ1 or a shadow of it, in the dtype of `features`; normalised images to features.
        features: v, [N, ...]; its dtype is the one computed in.
        input_shape: [C, H, W].
        start: normalised z to start from, [C, H, W] or [N, C, H, W], instead of `init`.
        mean, std, steps, lr, tv_weight, tv_beta, optimizer, init, clamp, keep, tolerance, patience, betas, eps,
            momentum: as in `fastinv.RMLE`.

    Returns:
        The normalised images z [N, C, H, W] and a report; its objective is that of the returned iterate.

    Raises:
        NetworkError: options out of range, or a start of another shape.
        FeatureError: features that hold NaN or Inf, or are not what the edge gives.
    """
    if optimizer not in OPTIMIZERS or keep not in KEEP:
        raise NetworkError(f"rmle: optimizer {optimizer!r}, keep {keep!r}; expected {OPTIMIZERS} and {KEEP}")
    if steps < 0 or min(lr, tv_weight, tolerance) < 0 or tv_beta < 1 or patience < 1:
        raise NetworkError(
            f"rmle: steps {steps}, lr {lr}, tv_weight {tv_weight}, tolerance {tolerance}, tv_beta {tv_beta}, patience "
            f"{patience}; expected the first four >= 0, the others >= 1"
        )
    if not isinstance(features, torch.Tensor) or features.ndim < 2 or not features.is_floating_point():
        raise FeatureError(f"rmle: features {features!r:.80}, expected a float tensor [N, ...]")
    if not bool(features.isfinite().all()):
        raise FeatureError("rmle: features hold NaN or Inf; drop or mend these images")
    count, dtype = len(features), features.dtype
    means, stds = (torch.as_tensor(v, dtype=dtype).reshape(-1, 1, 1) for v in (mean, std))
    try:
        if start is None:
            pixels = torch.as_tensor(np.array(init), dtype=dtype).expand(tuple(input_shape))
            start = (pixels - means) / stds
        z = start.to(dtype).expand(count, *input_shape).clone().requires_grad_(True)
    except RuntimeError as error:
        raise NetworkError(f"rmle: the start does not fit {count} images {list(input_shape)} ({error})") from None
    bounds = None if clamp is None else [(bound - means) / stds for bound in clamp]

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
        seen = edge(z)
        if seen.shape != features.shape:
            raise FeatureError(f"rmle: features {list(features.shape)}, but the edge gives {list(seen.shape)}")
        value = (seen - features).flatten(1).square().sum(dim=1)
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
