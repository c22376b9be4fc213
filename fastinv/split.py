"""Split: any classifier cut at a named layer into edge and cloud."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from fastinv import pixels, tensors, tracing
from fastinv.errors import FeatureError, SplitError
from fastinv.schedule import place_of


class Split:
    """The target f = cloud ∘ edge, cut after the layer `at`. Calling it is a query: images in, features out.

    Attributes:
        edge: f_θ1, normalised images to features; an `nn.Module` in eval mode.
        cloud: f_θ2, features to the model's results; likewise. Where more than the layer's result crosses the cut, of
            which a warning tells, there is none: asking for it raises SplitError.
        crossing: what else crosses, in words; empty where nothing does.
        at, mean, std: as given.

    Args:
        model: the classifier, in float32; it is copied, and neither changed nor kept. Of one that `torch.compile` made,
            the module that it was made of.
        at: dotted name of the last edge layer: "conv1", "layer1.0", any module. Where the model calls a module
            several times (a shared ReLU), the last call counts.
        mean, std: the model's input normalisation, one number for all channels or one for each.
        example: an input [N >= 2, C, H, W] of the model. With one, torch.export traces the model, which can follow
            branches on shapes; without, torch.fx does.

    Raises:
        SplitError: there is no such layer, the model cannot be traced, or it is in another precision.
    """

    def __init__(
        self,
        model: nn.Module,
        at: str,
        mean: Sequence[float] | float = (0.0,),
        std: Sequence[float] | float = (1.0,),
        *,
        example: torch.Tensor | None = None,
    ) -> None:
        model = cuttable(model)
        _expect_layer(model, at)
        self.at = at
        self.mean, self.std = tensors.normalisation(mean, std, error=SplitError)
        traced = tracing.trace(model, example, at)
        if example is None:
            calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.target == at]
        else:
            calls = [node for node in traced.graph.nodes if at in tracing.modules_of(node)]
        if not calls:
            raise SplitError(
                f"Split: layer {at!r} is never called, only inside another layer, or does nothing; choose another"
            )
        batch = tracing.batch_size(traced)
        self.edge = tracing.edge_of(traced, calls[-1])
        others = tracing.crossing(traced, calls[-1], batch)
        self._cloud = None if others else tracing.cloud_of(traced, calls[-1], batch)
        origins = list(dict.fromkeys(map(tracing.origin, others)))
        self.crossing = ", ".join(origins[:3]) + (f" and {len(origins) - 3} more" if len(origins) > 3 else "")
        if others:
            warnings.warn(
                f"Split: at {at!r} not only its result crosses: the cloud also needs {self.crossing}. The features "
                "are the result alone, and tell less than all that crosses; there is no cloud",
                UserWarning,
                stacklevel=2,
            )

    @property
    def cloud(self) -> nn.Module:
        if self._cloud is None:
            raise SplitError(
                f"Split: at {self.at!r} not only its result crosses: the cloud also needs {self.crossing}. Cut where "
                "they have joined, such as after the whole block. Attacks but train_shadow need no cloud, and take any "
                "module or callable for an edge: write one that gives all that crosses, flattened and concatenated"
            )
        return self._cloud

    def features(self, images: Any) -> Any:
        """Features [N, ...], float32, of images [N, C, H, W]; numpy gives numpy, torch gives torch.

        Args:
            images: float pixels in [0, 1], or uint8, whose 255 is 1.

        Raises:
            FeatureError: images of a wrong shape or dtype, with NaN or Inf, float pixels of 0 to 255, or what the
                model does not take.
        """
        data, dtype, is_torch = tensors.as_numpy(images, "images")
        if data.ndim != 4 or dtype not in pixels.KINDS:
            raise FeatureError(
                f"images of shape {list(data.shape)} and dtype {dtype}, expected float pixels in [0, 1], or uint8, "
                "[N, C, H, W]"
            )
        size = pixels.at_once(data.shape[1:])
        first = self._ask(data[:size] if len(data) else np.zeros((1, *data.shape[1:]), data.dtype), dtype)
        result = pixels.joined(first[: len(data)], lambda part: self._ask(data[part], dtype), len(data))
        return result if is_torch else result.numpy()

    def __call__(self, images: Any) -> Any:
        """The same as `features`."""
        return self.features(images)

    def __repr__(self) -> str:
        return f"Split(at={self.at!r}, mean={self.mean}, std={self.std})"

    def _ask(self, images: npt.NDArray[Any], dtype: str) -> torch.Tensor:
        """Features of a few images."""
        x = torch.tensor(pixels.checked(images, dtype))
        hint = pixels.channels_last_hint(tuple(x.shape[1:]))
        try:
            z = normalise(x, self.mean, self.std)
            with torch.no_grad():
                found = self.edge(z.to(place_of(self.edge)))
        except FeatureError as error:
            raise FeatureError(f"{error}{hint}") from None
        except RuntimeError as error:
            raise FeatureError(f"the model does not take images {list(x.shape[1:])} ({error!s:.200}){hint}") from error
        if not isinstance(found, torch.Tensor) or found.ndim < 2 or len(found) != len(x):
            what = list(found.shape) if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
            raise FeatureError(f"layer {self.at!r} gives {what} for {len(x)} images, expected [{len(x)}, ...]")
        return found.cpu()


def split_points(
    model: nn.Module, example: torch.Tensor | None = None, *, images: torch.Tensor | None = None
) -> list[str]:
    """Where a model can be cut such that only one layer's result crosses, in the order of its forward.

    Of a result that has several names, that of a block and of the block's last layer, the shortest is told. Layers that
    do nothing (dropout) or only reshape are left out, and so is the last one, whose result is the model's. A model may
    have other such layers, which `Split` takes: torch.fx finds no block whose last call writes into its argument.

    Args:
        model, example: as of `Split`.
        images: some normalised ones [N, C, H, W], or zeros: layers whose result for them is no tensor [N, ...] are left
            out, such as of tuples, and of sequences that have the tokens first. None takes the example; without
            either, such layers are among them.

    Raises:
        SplitError: as of `Split`.
        FeatureError: the model does not take the images.
    """
    model = cuttable(model)
    return tracing.split_points(tracing.trace(model, example), model, example if images is None else images)


def normalise(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """z = (x − mean) / std for pixels x [N, C, H, W].

    Raises:
        FeatureError: as many entries of mean or std as would not fit the channels; they are no finite numbers, or a
            std is not above 0.
    """
    numbers = tensors.normalisation(mean, std, x.shape[1])
    shift, scale = (torch.tensor(v, dtype=x.dtype).reshape(-1, 1, 1) for v in numbers)
    return (x - shift) / scale


def cuttable(model: Any) -> nn.Module:
    """A model that can be traced: of what torch.compile makes, the module that it was made of.

    Raises:
        SplitError: it is none.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, nn.Module):
        raise SplitError(f"Split: a {type(model).__name__}, expected a torch.nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise SplitError(
            f"Split: a {type(model).__name__}, in which no forward is left to cut; expected the torch.nn.Module it was "
            "made of. Or write the edge as a callable images -> features: queries need no more"
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise SplitError(f"Split: a {type(model).__name__}, expected the module in it: pass model.module")
    for name, parameter in model.named_parameters():
        if is_lazy(parameter) or parameter.is_meta:
            raise SplitError(f"Split: {name} has no values yet; load the model's weights, or call it once")
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise SplitError(f"Split: {name} is {parameter.dtype}, expected float32; call model.float() first")
    return model


def _expect_layer(model: nn.Module, at: str) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if at in names:
        return
    folded = {name.casefold(): name for name in names}
    close = [folded[c] for c in difflib.get_close_matches(str(at).casefold(), folded, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names[:20]) or 'none'}"
    raise SplitError(f"Split: the model has no layer {at!r:.60}; {hint}")
