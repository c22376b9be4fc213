"""rMLE's methods as stages: what a batch of images goes through before, in and after the turns of the loop.

Each image goes its own way, whatever the batch: one that is done stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fastinv.backends.cuda.banded import banded_problem
from fastinv.backends.cuda.lowering import PRECISIONS, Lowering
from fastinv.backends.cuda.native import OnChipDescent, pooled_problem, quadratic_problem
from fastinv.backends.cuda.nodes import ConvolutionNode, copy
from fastinv.backends.cuda.ops import kernel_for
from fastinv.backends.cuda.plan import Buffer, Ending, Stage
from fastinv.backends.cuda.quadratic import quadratic_form
from fastinv.inverters import RMLE
from fastinv.network import Network

if TYPE_CHECKING:
    import torch

# On chip, where pixels are halves of float16 and sums have a scale that is set once: five steps of Adam are right at a
# rate of 400, and leave its range at 2,000.
MOST_RATE = 64.0


@dataclass(frozen=True, eq=False)
class Method:
    """One way to the minimum.

    Attributes:
        state: what it keeps of the images from turn to turn, by the kernels' names.
        turn: what is repeated.
        turns: how often, at most; None: until no image runs.
        result: where the images are in the end.
        prepare: what is done first, with z = 0.
        begin: what is done then, with z the start.
        end: what is done after the turns.
        other: where a turn leaves its z, if not where it found it: then a turn back follows.
        ends_early: whether images may be done before the last turn.
    """

    state: dict[str, Buffer]
    turn: list[Stage]
    turns: int | None
    result: Buffer
    prepare: list[Stage] = field(default_factory=list)
    begin: list[Stage] = field(default_factory=list)
    end: list[Stage] = field(default_factory=list)
    other: Buffer | None = None
    ends_early: bool = True


class Objective:
    """The recipe's objective as stages that all methods are made of.

    Attributes:
        z: the images' buffer.
        target: the features', less the edge's bias where that is left out of `lowering`.
        shift: how features come to `target`: factors and zero points of their channels, or None for both.
        part: sums of the residual's squares.
        constant: the gradient's at z = 0, where the objective is taken as a quadratic form.
        report: the buffers of `value`, `running` and `taken`: the objective, how an image stands, and its steps.
        form: the objective as a quadratic form, or None.
        smooth: whether the gradient of `evaluate` is the total variation's, too.
    """

    def __init__(self, recipe: RMLE, precision: str, device: torch.device) -> None:
        from fastinv.kernels.triton.objective import Variation, tiles
        from fastinv.kernels.triton.quadratic import Quadratic

        self.recipe = recipe
        self.device = device
        self.form = form = quadratic_form(recipe)
        self._quadratic = None if form is None else Quadratic(form, device)
        self.smooth = form is not None and form.smooth
        # What a quadratic form leaves to the edge is done once: it may as well be exact.
        edge, precision = (recipe.edge, precision) if form is None else (_without_bias(recipe.edge), "float32")
        bias = None if form is None else _tensor(recipe.edge.steps[0].weights["bias"], device)
        self.shift = (None, None) if bias is None else (bias.new_ones(len(bias)), bias)
        self.lowering = Lowering(edge, device, PRECISIONS[precision], "float32", differentiable=True)
        self.z = self.lowering.input
        self.target = Buffer(self.lowering.output.elements, "float32")
        self.constant = self.image()
        self.report = {"value": Buffer(1, "float64"), "running": Buffer(1, "int32"), "taken": Buffer(1, "int32")}
        channels, height, width = recipe.input_shape
        self.variation = Variation((height, width, channels), recipe.tv_weight, recipe.tv_beta)
        self.part = Buffer(tiles(self.target.elements), "float32")

    def image(self) -> Buffer:
        """A new buffer like z."""
        return Buffer(self.z.elements, "float32")

    def with_state(self, launch: Any, reads: tuple[Buffer, ...], writes: tuple[Buffer, ...], state: Any) -> Stage:
        """A stage of `launch(*tensors read, *tensors written, state)`."""

        def make(tensors: Any) -> Any:
            named = {name: tensors(buffer) for name, buffer in state.items()}
            return launch(*map(tensors, (*reads, *writes)), named)

        return Stage(make, (*reads, *state.values()), (*writes, *state.values()))

    def evaluate(self, measured: bool = True) -> tuple[list[Stage], Buffer]:
        """Stages that leave the gradient in the buffer that comes with them, and, where it is asked, `part`."""
        if self._quadratic is None:
            return self._back(self.target)
        gradient = self.image()
        return [*(self.measure() if measured else []), self._times(self.z, self.constant, gradient)], gradient

    def evaluate_whole(self) -> tuple[list[Stage], Buffer]:
        """As `evaluate`; the gradient is float32, and the total variation's is in it."""
        stages, gradient = self.evaluate()
        return (stages, gradient) if self.smooth else self._with_variation(stages, gradient)

    def measure(self) -> list[Stage]:
        """Stages that make `part`."""
        return [*self.lowering.forward(), self._residual(self.target, None)]

    def value(self) -> list[Stage]:
        """Stages that leave the objective in `value`."""
        value = self.report["value"]

        def make(tensors: Any) -> Any:
            return self.variation.launch_value(tensors(self.z), tensors(self.part), tensors(value))

        return [*self.measure(), Stage(make, (self.z, self.part), (value,))]

    def to_constant(self) -> list[Stage]:
        """Stages that make `constant`, −2·Aᵀv; none where there is no quadratic form."""
        if self._quadratic is None:
            return []
        from fastinv.kernels.triton.epilogue import Epilogue

        (node,) = self.lowering.nodes
        assert isinstance(node, ConvolutionNode)
        back = kernel_for(self.lowering, node.back.geometry, -2 * node.weight.swapaxes(1, 2), None)

        def make(tensors: Any) -> Any:
            return back.launch(tensors(self.target), tensors(self.constant), Epilogue())

        return [Stage(make, (self.target,), (self.constant,))]

    def through_the_network(self) -> tuple[list[Stage], Buffer]:
        """As `evaluate_whole`, without the quadratic form."""
        return self._with_variation(*self._back(self.target))

    def times_matrix(self, origin: Buffer) -> tuple[list[Stage], Buffer]:
        """Stages that multiply z by the matrix H of a quadratic objective; `origin` has what the edge makes of 0."""
        if self._quadratic is None:
            return self._with_variation(*self._back(origin))
        product = self.image()
        return [self._times(self.z, None, product)], product

    def _residual(self, target: Buffer, into: Buffer | None, ending: Ending | None = None) -> Stage:
        from fastinv.kernels.triton.objective import launch_residual

        output, last = self.lowering.output, ending or Ending()

        def make(tensors: Any) -> Any:
            y, v, out, part = (tensors(b) for b in (output, target, into, self.part))
            return launch_residual(y, v, out, part, last.epilogue(tensors))

        return Stage(make, (output, target, *last.reads), (self.part,) if into is None else (into, self.part))

    def _back(self, target: Buffer) -> tuple[list[Stage], Buffer]:
        """Through the network, forward and back, to the gradient of Σ(edge(z) − target)²."""
        back, gradient = self.lowering.backward(lambda into, ending: self._residual(target, into, ending))
        return [*self.lowering.forward(), *back], gradient

    def _with_variation(self, stages: list[Stage], gradient: Buffer) -> tuple[list[Stage], Buffer]:
        whole = self.image()

        def make(tensors: Any) -> Any:
            return self.variation.launch_gradient(tensors(self.z), tensors(gradient), tensors(whole))

        return [*stages, Stage(make, (self.z, gradient), (whole,))], whole

    def _times(self, z: Buffer, constant: Buffer | None, out: Buffer) -> Stage:
        form = self._quadratic
        assert form is not None

        def make(tensors: Any) -> Any:
            return form.launch(tensors(z), tensors(constant), tensors(out))

        return Stage(make, (z,) if constant is None else (z, constant), (out,))


def _without_bias(edge: Network) -> Network:
    """An edge of one step that has weights, with a bias of 0."""
    (step,) = edge.steps
    weights = {**step.weights, "bias": np.zeros_like(step.weights["bias"])}
    return Network(edge.input_shape, (replace(step, weights=weights),))


def method_of(objective: Objective) -> Method:
    """The method that the recipe names."""
    return {"lbfgs": _lbfgs, "exact": _exact}.get(objective.recipe.method, _descent)(objective)


def descent_rule(objective: Objective) -> Any:
    """What gradient descent does in a step, a `fastinv.kernels.triton.descent.Descent`."""
    from fastinv.kernels.triton.descent import Descent

    recipe = objective.recipe
    low, high = _bounds(objective)
    return Descent(
        variation=objective.variation,
        sloped=not objective.smooth,
        optimizer=recipe.method,
        steps=recipe.steps,
        rates=_tensor(_rates(recipe), objective.device),
        tolerance=recipe.tolerance,
        patience=recipe.patience,
        keep_best=recipe.keep == "best",
        low=low,
        high=high,
        beta1=recipe.betas[0],
        beta2=recipe.betas[1],
        eps=recipe.eps,
        momentum=recipe.momentum,
    )


def on_chip(objective: Objective, rule: Any) -> tuple[OnChipDescent, Buffer] | None:
    """All steps in one launch, and the buffer of what it is given, where there is a kernel for that."""
    if rule.watched or objective.recipe.lr > MOST_RATE:
        return None
    form, given = objective.form, objective.target
    if form is None:
        problems = [pooled_problem(objective.recipe.edge)]
    else:
        problems, given = [banded_problem(form), quadratic_problem(form)], objective.constant
    chip = OnChipDescent([problem for problem in problems if problem is not None], rule, objective.device)
    return (chip, given) if chip.fits else None


def _descent(objective: Objective) -> Method:
    recipe, rule = objective.recipe, descent_rule(objective)
    moments = {name: objective.image() for name in ("first", "second", "third")}
    found = on_chip(objective, rule)
    if found is not None:
        chip, given = found
        steps = objective.with_state(chip.launch, (objective.z, given), (), moments | objective.report)
        return _plain(objective, moments, [steps], chip.launches)
    state = moments | {"best": objective.image()}
    state |= {"best_value": Buffer(1, "float64"), "calm": Buffer(1, "int32")}
    all_state = state | objective.report
    other = objective.image()
    stages, gradient = objective.evaluate(rule.watched)
    turn = [
        *stages,
        objective.with_state(rule.launch_advance, (objective.z, objective.part), (), all_state),
        objective.with_state(rule.launch_step, (objective.z, gradient), (other,), all_state),
    ]
    turns = (recipe.steps + 1 + rule.watched) // 2
    return replace(_plain(objective, state, turn, turns), other=other, ends_early=recipe.tolerance > 0)


def _plain(objective: Objective, state: dict[str, Buffer], turn: list[Stage], turns: int) -> Method:
    """All steps are taken, and then the objective is known."""
    prepare, end = objective.to_constant(), objective.value()
    return Method(state, turn, turns, objective.z, prepare=prepare, end=end, ends_early=False)


def _lbfgs(objective: Objective) -> Method:
    from fastinv.attacks.rmle import ARMIJO, FIRST_MOVE, PAIRS, TRIALS
    from fastinv.kernels.triton.launch import power_of_two
    from fastinv.kernels.triton.lbfgs import Lbfgs

    recipe = objective.recipe
    low, high = _bounds(objective)
    rule = Lbfgs(
        variation=objective.variation,
        steps=recipe.steps,
        tolerance=recipe.tolerance,
        patience=recipe.patience,
        pairs=PAIRS,
        first_move=FIRST_MOVE,
        armijo=ARMIJO,
        trials=TRIALS,
        low=low,
        high=high,
    )
    state = {name: objective.image() for name in ("best", "best_gradient", "direction")}
    state |= {name: Buffer(PAIRS * objective.z.elements, "float32") for name in ("moves", "changes")}
    state |= {"inverses": Buffer(power_of_two(PAIRS), "float64"), "numbers": Buffer(2, "float64")}
    state["counts"] = Buffer(5, "int32")
    stages, gradient = objective.evaluate_whole()
    step = objective.with_state(rule.launch, (objective.z, gradient, objective.part), (), state | objective.report)
    return Method(state, [*stages, step], None, state["best"], prepare=objective.to_constant())


def _exact(objective: Objective) -> Method:
    from fastinv.attacks.rmle import EXACT, STALLED
    from fastinv.kernels.triton.conjugate import ConjugateGradients

    rule = ConjugateGradients(objective.recipe.steps, EXACT, STALLED)
    state = {name: objective.image() for name in ("solution", "residual", "direction")}
    state |= {"numbers": Buffer(4, "float64"), "idle": Buffer(1, "int32")}
    origin = Buffer(objective.target.elements, "float32")
    all_state = state | objective.report
    first, gradient = objective.through_the_network()
    stages, image = objective.times_matrix(origin)
    return Method(
        state | {"origin": origin},
        [*stages, objective.with_state(rule.launch_step, (objective.z, image), (), all_state)],
        objective.recipe.steps,
        objective.z,
        prepare=[*objective.lowering.forward(), copy(objective.lowering.output, origin, Ending())],
        begin=[*first, objective.with_state(rule.launch_start, (objective.z, gradient), (), all_state)],
        end=[copy(state["solution"], objective.z, Ending()), *objective.value()],
    )


def _rates(recipe: RMLE) -> Any:
    """[steps, 2]: see `_step_kernel`."""
    t = np.arange(1, max(1, recipe.steps) + 1, dtype=np.float64)
    lr = np.full_like(t, recipe.lr)
    if recipe.schedule == "cosine":
        lr *= (1 + np.cos(np.pi * (t - 1) / max(1, recipe.steps))) / 2
    if recipe.method == "sgd":
        return np.stack([lr, lr], axis=1)
    beta1, beta2 = recipe.betas
    return np.stack([lr / (1 - beta1**t), (1 - beta2**t) ** -0.5], axis=1)


def _bounds(objective: Objective) -> tuple[Any, Any]:
    """Lowest and highest z of every channel, or None."""
    bounds = objective.recipe.bounds
    return (None, None) if bounds is None else tuple(_tensor(bound, objective.device) for bound in bounds)


def _tensor(values: Any, device: torch.device) -> Any:
    import torch

    return torch.from_numpy(np.array(values, np.float32)).to(device)
