"""Train a target and an attack on it; write the attack to a .finv file.

The targets are the paper's two: lenet5, for grey images of 28×28 pixels, and cifar_net, for colours of 32×32; pictures
in folders are resized to these. A model of your own is attacked by `fastinv audit`, or from Python: see fastinv.Split,
fastinv.train_inverse_network and fastinv.export.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastinv.cli.arguments import add_training_arguments, integer, plural, positive, shows_progress, start, threads
from fastinv.cli.demo import add_data_argument
from fastinv.cli.files import expect_apart, expect_place
from fastinv.data import KNOWLEDGE
from fastinv.errors import DataError, TrainingError
from fastinv.inverters import OPTIMIZERS, SCHEDULES, load_start
from fastinv.places import make_folder
from fastinv.schedule import OPTIMIZERS as TRAINING_OPTIMIZERS

if TYPE_CHECKING:
    from torch import nn

    from fastinv.experiment.target import Experiment
    from fastinv.inverters import Inverter
    from fastinv.split import Split

ATTACKS = {
    "inverse_network": "black-box: learn features -> images from queries",
    "rmle": "white-box: optimise through the edge itself",
    "shadow": "query-free: learn a stand-in for the edge through the cloud, then rmle",
    "fit_shadow": "black-box: learn a stand-in for the edge from queries, then rmle",
}
TRAINING = ("epochs", "batch_size", "lr", "optimizer")  # options of the attacks' training
WHERE = ("precision", "device")  # options of all training, the target's too
SOLVER = ("steps", "lr", "tv_weight", "tv_beta", "optimizer", "schedule", "init")  # options of rMLE
DECODER = ("kind", "width", "depth")  # options of an inverse network
LEARNED = ("knowledge", "images", *TRAINING)
RMLE_OPTIONS = tuple(f"rmle_{name}" for name in SOLVER)
OPTIONS = {  # of each attack
    "inverse_network": (*LEARNED, *DECODER),
    "rmle": RMLE_OPTIONS,
    "shadow": (*LEARNED, "architecture", *RMLE_OPTIONS),
    "fit_shadow": (*LEARNED, "architecture", *RMLE_OPTIONS),
}
DEFAULTS = {"knowledge": "distribution", "kind": "paper", "architecture": "same"}  # where they are left out
SCORED = {"inverse_network": 1000}  # test images that are recovered and scored
SCORED_RMLE = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", metavar="FILE", type=Path, required=True, help="the .finv file to write")
    add_data_argument(parser)
    parser.add_argument("--seed", type=integer, default=0, help="the same seed, the same result")
    parser.add_argument("--threads", type=threads, help="threads to use; all cores where left out")
    add_training_arguments(parser)
    parser.add_argument(
        "--checkpoint", metavar="FOLDER", type=Path, help="keep the state there after every epoch; go on from it"
    )
    parser.add_argument(
        "--score", type=integer, help="test images to recover and score; left out: 1000, or 8 with rMLE"
    )

    target = parser.add_argument_group("target")
    target.add_argument("--target", metavar="FILE", type=Path, help="its weights: read, or trained and written there")
    target.add_argument("--target-epochs", type=integer, default=5, help="passes over its half of the training set")
    target.add_argument("--split", help="the split point; left out: ReLU22 of cifar_net, ReLU2 of lenet5")

    attack = parser.add_argument_group("attack", "; ".join(f"{name}: {text}" for name, text in ATTACKS.items()))
    attack.add_argument("--attack", choices=ATTACKS, default="inverse_network", help="which of these")
    attack.add_argument(
        "--knowledge",
        choices=KNOWLEDGE,
        help="the attacker's images: the target's own, others like them, or Gaussian noise; left out: distribution",
    )
    attack.add_argument("--images", type=positive, help="how many of them; all where left out")
    attack.add_argument("--kind", choices=("paper", "residual"), help="of inverse network; left out: paper")
    attack.add_argument(
        "--width",
        type=positive,
        help="channels of a residual inverse network, and the fewest where the paper has none for the split point; "
        "left out: 64",
    )
    attack.add_argument("--depth", type=positive, help="blocks of a residual inverse network; left out: 4")
    attack.add_argument(
        "--architecture",
        choices=("same", "different"),
        help="of a shadow: the edge's or another; left out: same",
    )
    attack.add_argument("--epochs", type=integer, help="of the inverse network or shadow; left out: its own default")
    attack.add_argument("--batch-size", type=positive, help="likewise")
    attack.add_argument("--lr", type=float, help="likewise")
    attack.add_argument("--optimizer", choices=TRAINING_OPTIMIZERS, help="likewise")

    rmle = parser.add_argument_group("rMLE", "left out, each is the paper's for the split point")
    rmle.add_argument("--rmle-steps", type=integer, help="of the optimizer")
    rmle.add_argument("--rmle-lr", type=float, help="the step size")
    rmle.add_argument("--rmle-tv-weight", type=float, help="of total variation in the objective")
    rmle.add_argument("--rmle-tv-beta", type=float, help="its exponent: 2 for squares, 1 for edges that stay sharp")
    rmle.add_argument("--rmle-optimizer", choices=OPTIMIZERS, help="auto: exact where it can be, else lbfgs")
    rmle.add_argument("--rmle-schedule", choices=SCHEDULES, help="of the step size")
    rmle.add_argument(
        "--rmle-init", type=start, help="a pixel value, or the .finv file of an inverse network to refine"
    )


def run(args: argparse.Namespace) -> None:
    import torch

    import fastinv
    from fastinv.experiment.scores import Scores
    from fastinv.experiment.target import Experiment

    _check(args)
    experiment = Experiment.on(args.data, args.seed)
    at = _check_with(args, experiment)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    show = shows_progress()
    target = experiment.target(
        args.target_epochs,
        file=args.target,
        checkpoint=_checkpoint(args, "target"),
        progress=show,
        **_given(args, WHERE),
    )
    print(f"{experiment.model.name}: {experiment.accuracy(target, show):.2%} of the test images classified right")
    model = experiment.model
    split = fastinv.Split(target, at, model.mean, model.std)
    inverter = _attack(args, experiment, split)
    inverter.save(args.out)
    count = args.score if args.score is not None else SCORED.get(args.attack, SCORED_RMLE)
    print(f"{args.out}: {inverter.kind} at {split.at}")
    if count:
        truth = experiment.held_out(count)
        recovered = fastinv.invert(split.features(truth), inverter, threads=args.threads, progress=show)
        print(f"{plural(len(truth), 'test image')} recovered: {Scores.of(truth, recovered)}")


def _check(args: argparse.Namespace) -> None:
    """Find out before the training, not after it, what cannot work; fill in what was left out."""
    own = OPTIONS[args.attack]
    for name in sorted({name for options in OPTIONS.values() for name in options}.difference(own)):
        if getattr(args, name) is not None:
            others = " or ".join(attack for attack, options in OPTIONS.items() if name in options)
            option = name.replace("_", "-")
            raise TrainingError(f"--{option} is of --attack {others}, not of {args.attack}: leave one of them out")
    vars(args).update({name: value for name, value in DEFAULTS.items() if getattr(args, name) is None})
    if args.attack == "shadow" and args.knowledge == "noise":
        raise DataError("noise has no labels, which a shadow needs: pass --knowledge same or distribution")
    if args.checkpoint is not None:
        make_folder(args.checkpoint)
    for path in filter(None, (args.out, args.target)):
        expect_place(path)
    expect_apart(args.out, target=args.target, rmle_init=args.rmle_init if isinstance(args.rmle_init, Path) else None)


def _check_with(args: argparse.Namespace, experiment: Experiment) -> str:
    """The same of what depends on the data; the split point."""
    from fastinv.models import shadow_edge
    from fastinv.schedule import Schedule

    fresh = experiment.untrained(args.split)
    available = len(experiment.half(args.knowledge))
    if args.images is not None and args.knowledge != "noise" and args.images > available:
        raise DataError(f"{args.images:,} images asked for, of {available:,} of knowledge {args.knowledge!r}")
    Schedule(args.target_epochs, 1, 1.0, seed=args.seed, **_given(args, WHERE))
    Schedule(args.epochs or 0, args.batch_size or 1, 1.0 if args.lr is None else args.lr, args.optimizer or "adam")
    if isinstance(args.rmle_init, Path):
        args.rmle_init = load_start(args.rmle_init)
    if args.attack == "inverse_network":
        return fresh.at
    if args.architecture == "different":
        shadow_edge(fresh.at)  # refuses a split point that it has no other structure for
    experiment.rmle(fresh, fresh.edge, _given(args, SOLVER, "rmle_"))  # refuses a recipe that cannot work
    return fresh.at


def _attack(args: argparse.Namespace, experiment: Experiment, split: Split) -> Inverter:
    solver = _given(args, SOLVER, "rmle_")
    if args.attack == "rmle":
        return experiment.rmle(split, split.edge, solver, attack="rmle")
    training = _given(args, TRAINING + WHERE) | {"seed": args.seed, "checkpoint": _checkpoint(args, args.attack)}
    known = {"attack": args.attack, "knowledge": args.knowledge, "images": args.images or "all"}
    known |= _given(args, (*TRAINING, "precision"))
    if args.attack == "inverse_network":
        decoder = _inverse_network(args, experiment, split, training)
        return experiment.inverse_network(split, decoder, **known, decoder=args.kind)
    shadow = experiment.shadow(
        args.attack,
        split,
        args.knowledge,
        args.architecture,
        args.images,
        progress=shows_progress(),
        **training,
    )
    return experiment.rmle(split, shadow, solver, **known, architecture=args.architecture)


def _inverse_network(
    args: argparse.Namespace, experiment: Experiment, split: Split, training: dict[str, Any]
) -> nn.Module:
    import fastinv

    images = experiment.attacker_images(args.knowledge, args.images)
    options = _given(args, DECODER) | training
    return fastinv.train_inverse_network(split, images, progress=shows_progress(), **options)


def _given(args: argparse.Namespace, names: tuple[str, ...], prefix: str = "") -> dict[str, Any]:
    """The options that were given; what was not is left to the functions' own defaults."""
    values = {name: getattr(args, prefix + name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _checkpoint(args: argparse.Namespace, name: str) -> Path | None:
    return None if args.checkpoint is None else Path(args.checkpoint, f"{name}.checkpoint")
