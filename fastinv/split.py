"""Split: any classifier cut at a named layer into edge and cloud."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import fx, nn

from fastinv import pixels, tensors
from fastinv.errors import FeatureError, SplitError
from fastinv.schedule import place_of


class Split:
    """The target f = cloud ∘ edge, cut after the layer `at`. Calling it is a query: images in, features out.

    Attributes:
        edge: f_θ1, normalised images to features; an `nn.Module` in eval mode.
        cloud: f_θ2, features to the model's results; likewise. Where more than the layer's result crosses the cut, of
            which a warning tells, there is none: asking for it raises SplitError.
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
        model = getattr(model, "_orig_mod", model)  # of what torch.compile makes
        _expect_model(model)
        _expect_layer(model, at)
        self.at = at
        self.mean, self.std = tensors.normalisation(mean, std, error=SplitError)
        traced = _traced(model, example, at)
        if example is None:
            calls = [node for node in traced.graph.nodes if node.op == "call_module" and node.target == at]
        else:
            calls = [node for node in traced.graph.nodes if at in _modules_of(node)]
        if not calls:
            raise SplitError(
                f"Split: layer {at!r} is never called, only inside another layer, or does nothing; choose another"
            )
        batch = _batch_size(traced)
        self.edge = _edge(traced, calls[-1])
        crossing = _crossing(traced, calls[-1], batch)
        self._cloud = None if crossing else _cloud(traced, calls[-1], batch)
        origins = list(dict.fromkeys(map(_origin, crossing)))
        self._crossing = ", ".join(origins[:3]) + (f" and {len(origins) - 3} more" if len(origins) > 3 else "")
        if crossing:
            warnings.warn(
                f"Split: at {at!r} not only its result crosses: the cloud also needs {self._crossing}. The features "
                "are the result alone, and tell less than all that crosses; there is no cloud",
                UserWarning,
                stacklevel=2,
            )

    @property
    def cloud(self) -> nn.Module:
        if self._cloud is None:
            raise SplitError(
                f"Split: at {self.at!r} not only its result crosses: the cloud also needs {self._crossing}. Cut where "
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


def split_points(model: nn.Module, example: torch.Tensor | None = None) -> list[str]:
    """Where a model can be cut such that only one layer's result crosses, in the order of its forward.

    Of a result that has several names, that of a block and of the block's last layer, the shortest is told. Layers that
    do nothing (dropout) or only reshape are left out, and so is the last one, whose result is the model's.

    Args:
        model, example: as of `Split`.

    Raises:
        SplitError: as of `Split`.
    """
    model = getattr(model, "_orig_mod", model)
    _expect_model(model)
    traced = _traced(model, example)
    batch = _batch_size(traced)
    *nodes, output = traced.graph.nodes
    last = {name: node for node in nodes for name in _modules_of(node) if name}
    seen = {_source(node, traced) for node in nodes if node.op == "placeholder" or node in output.all_input_nodes}
    found = []
    for node in nodes:
        names = [name for name, call in last.items() if call is node]
        source = _source(node, traced)
        if names and source not in seen and not _crossing(traced, node, batch):
            seen.add(source)
            found.append(min(names, key=len))
    return found


def normalise(x: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """z = (x − mean) / std for pixels x [N, C, H, W].

    Raises:
        FeatureError: as many entries of mean or std as would not fit the channels; they are no finite numbers, or a
            std is not above 0.
    """
    numbers = tensors.normalisation(mean, std, x.shape[1])
    shift, scale = (torch.tensor(v, dtype=x.dtype).reshape(-1, 1, 1) for v in numbers)
    return (x - shift) / scale


def _expect_model(model: Any) -> None:
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
        if parameter.is_floating_point() and parameter.dtype is not torch.float32:
            raise SplitError(f"Split: {name} is {parameter.dtype}, expected float32; call model.float() first")


def _expect_layer(model: nn.Module, at: str) -> None:
    names = [name for name, _ in model.named_modules() if name]
    if at in names:
        return
    folded = {name.casefold(): name for name in names}
    close = [folded[c] for c in difflib.get_close_matches(str(at).casefold(), folded, n=3)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(names[:20]) or 'none'}"
    raise SplitError(f"Split: the model has no layer {at!r:.60}; {hint}")


# ---- tracing -------------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own layers and the one to cut at."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self._at or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module, example: torch.Tensor | None, at: str = "") -> fx.GraphModule:
    """A copy of the model as a graph, in which the layer `at` is one node where torch.fx traces it."""
    own = copy.deepcopy(model).eval()
    return _trace(own, at) if example is None else _export(own, example)


def _trace(model: nn.Module, at: str) -> fx.GraphModule:
    try:
        graph = _Tracer(at).trace(model)
    except Exception as error:  # torch.fx raises many types
        raise SplitError(
            f"Split: torch.fx cannot trace {type(model).__name__} ({error!s:.200}). Pass example=, an input [N >= 2, "
            "C, H, W]: torch.export follows branches on shapes. Its forward must not branch on values"
        ) from error
    if sum(node.op == "placeholder" for node in graph.nodes) != 1:
        raise SplitError("Split: the model takes several inputs, expected one tensor of images")
    return _tidy(fx.GraphModule(model, graph))


def _export(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    if not isinstance(example, torch.Tensor) or example.ndim != 4 or len(example) < 2:
        found = list(example.shape) if isinstance(example, torch.Tensor) else f"a {type(example).__name__}"
        raise SplitError(f"Split: the example is {found}, expected a tensor [N >= 2, C, H, W]")
    batch = torch.export.Dim("batch", min=2)
    try:
        with torch.no_grad():
            program = torch.export.export(
                model, (example.to(place_of(model)),), dynamic_shapes=({0: batch},), strict=False
            )
    except Exception as error:  # torch.export raises many types
        raise SplitError(
            f"Split: torch.export cannot trace {type(model).__name__} ({error!s:.300}); its forward must not branch "
            "on values or on the batch size. Build edge and cloud by hand: attacks take any nn.Module"
        ) from error
    traced = program.module(check_guards=False)
    assert isinstance(traced, fx.GraphModule)
    (output,) = (node for node in traced.graph.nodes if node.op == "output")
    results = output.args[0]
    if not isinstance(results, Sequence) or len(results) != 1:
        raise SplitError("Split: the model gives several results, expected one tensor")
    output.args = (results[0],)
    return _tidy(traced)


def _modules_of(node: fx.Node) -> set[str]:
    """Names of the modules in whose forward an exported call lies."""
    return {name for name, _ in node.meta.get("nn_module_stack", {}).values()}


IDLE = {"identity", "dropout", "dropout1d", "dropout2d", "alphadropout", "alpha_dropout", "feature_dropout"}
RESHAPING = {"flatten", "unflatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"}


def _source(node: fx.Node, traced: fx.GraphModule) -> fx.Node:
    """Where a value was computed that calls since then have only reshaped, or done nothing to (dropout)."""
    while node.all_input_nodes and _call(node, traced) in IDLE | RESHAPING:
        node = node.all_input_nodes[0]
    return node


def _call(node: fx.Node, traced: fx.GraphModule) -> str:
    """The name of what a node calls; of a module its class, as "maxpool2d"."""
    if node.op == "call_module":
        return type(traced.get_submodule(str(node.target))).__name__.lower()
    return _function(node)


def _function(node: fx.Node) -> str:
    """The name of the function or method that a node calls, without its overload: "flatten"."""
    return getattr(node.target, "__name__", str(node.target)).partition(".")[0]


def _batch_size(traced: fx.GraphModule) -> fx.Node:
    """One node for the first size of the images, which all that read it are made to use."""
    (images,) = (node for node in traced.graph.nodes if node.op == "placeholder")
    readers = [node for node in traced.graph.nodes if _reads_batch_size(node, images)]
    with traced.graph.inserting_after(images):
        size = traced.graph.call_method("size", (images, 0))
    for node in readers:
        node.replace_all_uses_with(size)
    _tidy(traced)
    return size


def _reads_batch_size(node: fx.Node, images: fx.Node) -> bool:
    """Whether it is `x.size(0)`, `x.shape[0]`, `x.size()[0]` or what torch.export makes of them."""
    if str(node.target) in ("size", "aten.sym_size.int"):
        return node.args == (images, 0)
    if getattr(node.target, "__name__", "") != "getitem" or node.args[1] != 0:
        return False
    sizes = node.args[0]
    if not isinstance(sizes, fx.Node):
        return False
    return sizes.args == (images, "shape") or (sizes.target == "size" and sizes.args == (images,))


# ---- cutting -------------------------------------------------------------------------------------------------------


def _edge(traced: fx.GraphModule, cut: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node is cut:
            break
    graph.output(known[cut])
    return _tidy(fx.GraphModule(traced, graph)).eval()


def _crossing(traced: fx.GraphModule, cut: fx.Node, batch: fx.Node) -> list[fx.Node]:
    """What varies with the images, is computed before the cut, and needed after it, besides the cut's result."""
    nodes = list(traced.graph.nodes)
    before, after = nodes[: nodes.index(cut)], nodes[nodes.index(cut) + 1 :]
    known, varying = {cut, batch, *after}, _varying(nodes, batch)
    found: dict[fx.Node, None] = {}
    waiting = list(after)
    while waiting:
        for needed in waiting.pop().all_input_nodes:
            if needed not in known:
                known.add(needed)
                if needed in varying:
                    found[needed] = None
                else:
                    waiting.append(needed)
    return [node for node in before if node in found]


def _origin(node: fx.Node) -> str:
    """Where a value comes from, in the model's own names."""
    if node.op == "placeholder":
        return "the images"
    if node.op == "call_module":
        return f"what {str(node.target)!r} gives"
    name = _function(node)
    modules = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]
    return f"what {name} in {modules[-1]!r} gives" if modules else f"what {name} in the model's forward gives"


def _cloud(traced: fx.GraphModule, cut: fx.Node, batch: fx.Node) -> fx.GraphModule:
    """What follows the cut. It needs the cut's result, constants and the batch size, and nothing else."""
    nodes = list(traced.graph.nodes)
    after = nodes[nodes.index(cut) + 1 :]
    graph = fx.Graph()
    features = graph.placeholder("features")
    if any(_in_place(node, traced) for node in after):
        features = graph.call_method("clone", (features,))  # the caller's tensor stays as it is
    known = {cut: features, batch: graph.call_method("size", (features, 0))}

    def fetch(needed: fx.Node) -> fx.Node:
        if needed not in known:
            known[needed] = graph.node_copy(needed, fetch)
        return known[needed]

    for node in after:
        known[node] = graph.node_copy(node, fetch)
    return _tidy(fx.GraphModule(traced, graph)).eval()


def _varying(nodes: Sequence[fx.Node], batch: fx.Node) -> set[fx.Node]:
    """The nodes that depend on the images, and not only on how many there are."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node is not batch and (node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes)):
            found.add(node)
    return found


def _in_place(node: fx.Node, root: nn.Module) -> bool:
    """Whether a call writes into its argument, so that it counts even where nobody reads its result."""
    if node.op == "call_module":
        return bool(getattr(root.get_submodule(str(node.target)), "inplace", False))
    name = _function(node)
    return bool(node.kwargs.get("inplace")) or (name.endswith("_") and not name.endswith("__")) or name == "iadd"


def _tidy(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code(lambda node: node.is_impure() or _in_place(node, module))
    module.recompile()
    module.delete_all_unused_submodules()
    return module
