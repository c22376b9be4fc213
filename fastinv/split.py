"""Split: any classifier cut at a named layer into edge and cloud."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fastinv import tensors
from fastinv.errors import FeatureError, SplitError

BATCH = 256  # images whose features are computed at once


class Split:
    """The target f = cloud ∘ edge, cut after the layer `at`. Calling it is a query: images in, features out.

    Attributes:
        edge: f_θ1, normalised images to features; an `nn.Module` in eval mode.
        cloud: f_θ2, features to the model's results; likewise.
        at, mean, std: as given.

    Args:
        model: the classifier; it is copied, and neither changed nor kept.
        at: dotted name of the last edge layer: "conv1", "layer1.0", any module. Where the model calls a module
            several times (a shared ReLU), the last call counts.
        mean, std: the model's input normalisation, one number for all channels or one for each.

    Raises:
        SplitError: there is no such layer, the model cannot be traced, or more than the layer's result crosses.
    """

    def __init__(
        self,
        model: nn.Module,
        at: str,
        mean: Sequence[float] = (0.0,),
        std: Sequence[float] = (1.0,),
    ) -> None:
        if not isinstance(model, nn.Module):
            raise SplitError(f"Split: a {type(model).__name__}, expected a torch.nn.Module")
        names = [name for name, _ in model.named_modules() if name]
        if at not in names:
            folded = {name.casefold(): name for name in names}
            close = [folded[c] for c in difflib.get_close_matches(str(at).casefold(), folded, n=3)]
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names[:20])}"
            raise SplitError(f"Split: the model has no layer {at!r:.60}; {hint}")
        self.at = at
        self.mean, self.std = tuple(map(float, mean)), tuple(map(float, std))
        if not all(s > 0 for s in self.std):
            raise SplitError(f"Split: std {self.std}, expected numbers above 0")
        traced = _trace(copy.deepcopy(model).eval(), at)
        cut = _cut_node(traced, at)
        _expect_clean(traced, cut, at)
        self.edge = _edge(traced, cut)
        self.cloud = _cloud(traced, cut)

    def features(self, images: Any) -> Any:
        """Features [N, ...], float32, of images [N, C, H, W], pixels; numpy gives numpy, torch gives torch."""
        data, dtype, is_torch = tensors.as_numpy(images, "images")
        if data.ndim != 4 or dtype not in ("float32", "float64"):
            raise FeatureError(
                f"images of shape {list(data.shape)} and dtype {dtype}, expected float pixels [N, C, H, W] in [0, 1]"
            )
        parts = []
        with torch.no_grad():
            for start, stop in tensors.chunks(len(data), BATCH):
                pixels = torch.tensor(data[start:stop], dtype=torch.float32)
                parts.append(self.edge(normalise(pixels, self.mean, self.std)))
            if not parts:
                parts.append(self.edge(torch.zeros(1, *data.shape[1:]))[:0])
        result = torch.cat(parts)
        return result if is_torch else result.numpy()

    def __call__(self, images: Any) -> Any:
        """The same as `features`."""
        return self.features(images)

    def __repr__(self) -> str:
        return f"Split(at={self.at!r}, mean={self.mean}, std={self.std})"


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """z = (x − mean) / std for images [N, C, H, W]."""
    shift, scale = (torch.as_tensor(v, dtype=pixels.dtype).reshape(-1, 1, 1) for v in (mean, std))
    return (pixels - shift) / scale


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own layers and the one to cut at."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self._at or super().is_leaf_module(m, module_qualified_name)


def _trace(model: nn.Module, at: str) -> fx.GraphModule:
    try:
        graph = _Tracer(at).trace(model)
    except Exception as error:  # torch.fx raises many types
        raise SplitError(
            f"Split: torch.fx cannot trace {type(model).__name__} ({error!s:.200}); its forward must not branch on "
            "values. Rewrite that part, or build edge and cloud by hand: attacks take any nn.Module"
        ) from error
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise SplitError("Split: the model takes several inputs, expected one tensor of images")
    traced = fx.GraphModule(model, graph)
    traced.graph.eliminate_dead_code()
    return traced


def _cut_node(traced: fx.GraphModule, at: str) -> fx.Node:
    calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.target == at]
    if not calls:
        raise SplitError(f"Split: layer {at!r} is never called, or only inside another layer; choose one that runs")
    last: fx.Node = calls[-1]
    return last


def _expect_clean(traced: fx.GraphModule, cut: fx.Node, at: str) -> None:
    """The cloud must need nothing but the cut's result."""
    nodes = list(traced.graph.nodes)
    before = set(nodes[: nodes.index(cut)])
    for node in nodes[nodes.index(cut) + 1 :]:
        for needed in node.all_input_nodes:
            if needed in before and needed.op != "get_attr":
                raise SplitError(
                    f"Split: at {at!r} not only its result crosses: {node.name} also needs {needed.name}, computed "
                    "before. Cut where the two have joined, such as after the whole block"
                )


def _edge(traced: fx.GraphModule, cut: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node is cut:
            break
    graph.output(known[cut])
    return _module(traced, graph)


def _cloud(traced: fx.GraphModule, cut: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    known = {cut: graph.placeholder("features")}
    passed = False
    for node in traced.graph.nodes:
        if (passed and node is not cut) or node.op == "get_attr":
            known[node] = graph.node_copy(node, known.__getitem__)
        passed = passed or node is cut
    return _module(traced, graph)


def _module(traced: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    module = fx.GraphModule(traced, graph)
    module.graph.eliminate_dead_code()
    module.recompile()
    module.delete_all_unused_submodules()
    return module.eval()
