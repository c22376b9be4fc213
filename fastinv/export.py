"""`export`: an `nn.Module` becomes a `Network`, through torch.export.

torch.export gives a graph of aten calls. What does not depend on the input is computed on the spot; every other call
is turned into steps by its converter in `fastinv.aten.CONVERTERS`; then `simplify` folds and fuses.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastinv.errors import FastinvError, NetworkError, UnsupportedOp
from fastinv.network import Network

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-3  # relative; a wrong conversion is off by far more, float32 rounding by far less


def export(module: torch.nn.Module, example: torch.Tensor) -> Network:
    """The network that `module` computes, for any batch size.

    Args:
        module: in eval mode, with finite weights; takes one tensor and gives one.
        example: an input [N, ...] with N >= 2; the shape after N is the network's.

    Raises:
        NetworkError: the module or the example is not as said above, or images of a batch affect each other.
        UnsupportedOp: the module uses an operation that has no counterpart; the message names it and its place.
    """
    import torch

    from fastinv.aten import convert
    from fastinv.aten.attention import batch_first_attention

    _check(module, example)
    example = example.detach().float()
    batch = torch.export.Dim("batch", min=2)
    try:
        with torch.no_grad(), _quiet(), batch_first_attention():
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},), strict=False)
    except FastinvError:
        raise
    except Exception as error:  # torch.export raises many types
        said = " ".join(str(error).split())
        raise NetworkError(
            f"torch.export cannot trace {type(module).__name__} for any batch size ({said:.300}); its forward "
            "must not branch on values or on the batch size, nor take len(x) for x.shape[0], nor mix images"
        ) from error
    network = convert(program, tuple(example.shape[1:]))
    _verify(network, module, example)
    return network


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What goes to stderr within is shown only if nothing is raised: torch.export prints its graph before it raises."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            yield
    finally:
        logger.setLevel(level)
    sys.stderr.write(said.getvalue())


def _check(module: Any, example: Any) -> None:
    import torch

    if not isinstance(module, torch.nn.Module):
        raise NetworkError(f"export: a {type(module).__name__}, expected a torch.nn.Module")
    if isinstance(module, torch.jit.ScriptModule):
        raise NetworkError("export: a TorchScript module cannot be exported; pass the nn.Module it was made from")
    if not isinstance(example, torch.Tensor) or not example.is_floating_point():
        found = str(example.dtype) if isinstance(example, torch.Tensor) else type(example).__name__
        raise NetworkError(f"export: the example is {found}, expected a float tensor [N >= 2, ...]")
    if example.device.type != "cpu" or example.layout is not torch.strided or example.is_nested:
        layout = "nested" if example.is_nested else example.layout
        raise NetworkError(f"export: the example is {layout} on {example.device}, expected a dense one on cpu")
    if not bool(example.detach().double().isfinite().all()):
        raise NetworkError("export: the example holds NaN or Inf; pass another, such as torch.zeros(2, ...)")
    if example.ndim < 2 or len(example) < 2:
        raise NetworkError(
            f"export: the example has shape {list(example.shape)}, expected [N, ...] with N >= 2, so that the batch "
            "size stays free: repeat it, as in torch.zeros(2, ...)"
        )
    parameters = inspect.signature(module.forward).parameters.values()
    needed = [p.name for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(needed) > 1:
        raise NetworkError(
            f"export: the module takes {', '.join(needed)}, expected one tensor; wrap it in one that does"
        )
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        raise NetworkError(f"export: {training[0]} is in training mode; call module.eval() first")
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise NetworkError(f"export: {name} is {parameter.dtype}, expected float32; call module.float() first")
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        if value.device.type != "cpu":
            raise NetworkError(f"export: {name} is on {value.device}; move the module with .cpu() first")
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NetworkError(f"export: {name} holds NaN or Inf; train the module again or mend it")


def _verify(network: Network, module: torch.nn.Module, example: torch.Tensor) -> None:
    """Compare network and module: a wrong conversion must not go unseen.

    On the example and on random inputs, in a batch of another size than it was traced with.
    """
    import torch

    from fastinv.backends.torch import as_module

    generator = torch.Generator().manual_seed(0)
    x = torch.cat([example[:2], torch.randn(len(example), *example.shape[1:], generator=generator)[:3]])
    x = torch.cat([x, x[:1]]) if len(x) == len(example) else x
    with torch.no_grad():
        expected = module(x.clone())  # which may work in place
        found = as_module(network, torch.float32)(x)
    if not isinstance(expected, torch.Tensor):
        raise NetworkError(
            f"export: the module gives a {type(expected).__name__}, expected one tensor; wrap it in one that does"
        )
    if found.shape != expected.shape:
        raise NetworkError(f"export: gives shape {list(found.shape)}, but the module {list(expected.shape)}")
    error = float((found - expected).double().norm() / expected.double().norm().clamp_min(1e-12))
    if not error <= TOLERANCE or not math.isfinite(error):
        raise UnsupportedOp(
            f"export: the network differs from the module by {error:.2g} (relative); some operation of the module "
            "is not what it seems, such as randomness or state in its forward"
        )
