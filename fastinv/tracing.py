"""A model as a graph: where calls lie, what crosses a cut, and the parts on either side of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from fastinv.errors import FeatureError, SplitError
from fastinv.schedule import place_of


class _Tracer(fx.Tracer):
    """Looks into every module but torch's own layers and the one to cut at."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self._at = at

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name == self._at or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, example: torch.Tensor | None, at: str = "") -> fx.GraphModule:
    """A copy of the model as a graph, in which the layer `at` is one node where torch.fx traces it."""
    own = copy.deepcopy(model).eval()
    return _by_fx(own, at) if example is None else _by_export(own, example)


def _by_fx(model: nn.Module, at: str) -> fx.GraphModule:
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


def _by_export(model: nn.Module, example: torch.Tensor) -> fx.GraphModule:
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


def modules_of(node: fx.Node) -> set[str]:
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


def split_points(traced: fx.GraphModule, model: nn.Module, images: torch.Tensor | None) -> list[str]:
    """As `fastinv.split_points`, of a model as it was traced."""
    names = {name for name, _ in model.named_modules() if name}
    fitting = None if images is None else _with_batch_first(traced, images)
    batch = batch_size(traced)
    *nodes, output = traced.graph.nodes
    last = {name: node for node in nodes for name in modules_of(node) & names}
    seen = {_source(node, traced) for node in nodes if node.op == "placeholder" or node in output.all_input_nodes}
    found = []
    for node in nodes:
        ends = [name for name, call in last.items() if call is node]
        source = _source(node, traced)
        fits = fitting is None or node in fitting
        if ends and fits and source not in seen and not crossing(traced, node, batch):
            seen.add(source)
            found.append(min(ends, key=len))
    return found


def _with_batch_first(traced: fx.GraphModule, images: torch.Tensor) -> set[fx.Node]:
    """What has features [N, ...] for N images, in the model's own form.

    Raises:
        FeatureError: the model does not take them.
    """
    found = set()

    class Probe(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result = super().run_node(node)
            if isinstance(result, torch.Tensor) and result.ndim >= 2 and len(result) == len(images):
                found.add(node)
            return result

    try:
        with torch.no_grad():
            Probe(traced).run(images.to(place_of(traced)))
    except Exception as error:  # of the model's code, any
        raise FeatureError(f"the model does not take images {list(images.shape[1:])} ({error!s:.200})") from error
    return found


def batch_size(traced: fx.GraphModule) -> fx.Node:
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


def edge_of(traced: fx.GraphModule, cut: fx.Node) -> fx.GraphModule:
    graph = fx.Graph()
    known: dict[fx.Node, fx.Node] = {}
    for node in traced.graph.nodes:
        known[node] = graph.node_copy(node, known.__getitem__)
        if node is cut:
            break
    graph.output(known[cut])
    return _tidy(fx.GraphModule(traced, graph)).eval()


def crossing(traced: fx.GraphModule, cut: fx.Node, batch: fx.Node) -> list[fx.Node]:
    """What varies with the images, is computed before the cut, and needed after it, besides the cut's result.

    That tells how many images there are, if they are its first axis.
    """
    nodes = list(traced.graph.nodes)
    before, after = nodes[: nodes.index(cut)], nodes[nodes.index(cut) + 1 :]
    told = {batch} if _has_batch_first(cut, nodes) else set()
    known, varying = {cut, *told, *after}, _varying(nodes, told)
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


def origin(node: fx.Node) -> str:
    """Where a value comes from, in the model's own names."""
    if node.op == "placeholder":
        return "the images"
    if node.op == "call_module":
        return f"what {str(node.target)!r} gives"
    name = _function(node)
    modules = [name for name, _ in node.meta.get("nn_module_stack", {}).values() if name]
    return f"what {name} in {modules[-1]!r} gives" if modules else f"what {name} in the model's forward gives"


def cloud_of(traced: fx.GraphModule, cut: fx.Node, batch: fx.Node) -> fx.GraphModule:
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


def _has_batch_first(cut: fx.Node, nodes: Sequence[fx.Node]) -> bool:
    """Whether the images are the first axis of a value; torch.fx, which knows no shapes, is taken to mean so."""
    images = next(node for node in nodes if node.op == "placeholder").meta.get("val")
    value = cut.meta.get("val")
    if not isinstance(images, torch.Tensor):
        return True
    return isinstance(value, torch.Tensor) and value.ndim > 0 and str(value.shape[0]) == str(images.shape[0])


def _varying(nodes: Sequence[fx.Node], known: set[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on the images, and not only on what is known anyway."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node not in known and (node.op == "placeholder" or not found.isdisjoint(node.all_input_nodes)):
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
