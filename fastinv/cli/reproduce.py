"""Run the paper's experiments on data of yours, and write its tables anew.

The target is the paper's for these images: lenet5 for MNIST, cifar_net for CIFAR-10. Each has its own folder among the
results; what is done there is not done again, and the report covers both. CIFAR-10 takes hours on a few cores.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from fastinv.cli.arguments import add_training_arguments, integer, plural, positive, shows_progress, threads
from fastinv.cli.demo import add_data_argument
from fastinv.reproduce.paper import TABLES
from fastinv.reproduce.settings import OPTIMIZERS, Effort


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_data_argument(parser, required=True)
    parser.add_argument(
        "-o", "--out", metavar="FOLDER", type=Path, default=Path("fastinv-reproduction"), help="for the results"
    )
    parser.add_argument(
        "--tables",
        nargs="+",
        choices=TABLES,
        help="which of the paper's: 3: rMLE; 4: inverse networks; 6: shadows; 8: shadows fitted to queries; layers: "
        "its Figures 11 and 12; left out: all",
    )
    parser.add_argument("--splits", nargs="+", metavar="LAYER", help="which of their split points; left out: all")
    parser.add_argument("--seed", type=integer, default=0, help="the same seed, the same result")
    parser.add_argument("--threads", type=threads, help="threads to use; all cores where left out")
    add_training_arguments(parser)
    effort = parser.add_argument_group("effort", "left out: what suits the target; one folder has one effort")
    effort.add_argument("--target-epochs", type=integer, help="passes over the target's half of the training set")
    effort.add_argument("--inverse-network-epochs", type=integer, help="likewise of inverse networks")
    effort.add_argument("--shadow-epochs", type=integer, help="likewise of shadows")
    effort.add_argument("--images", type=positive, help="how many an attacker has, at most")
    effort.add_argument("--scored", type=positive, help="test images that are recovered; left out: 1000")
    effort.add_argument(
        "--optimizer",
        choices=OPTIMIZERS,
        help="of rMLE; left out: adam, the paper's; lbfgs gets as far in a fraction of the time",
    )


def run(args: argparse.Namespace) -> int:
    import torch

    from fastinv.reproduce.run import Reproduction, run

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    given = {field.name: getattr(args, field.name) for field in fields(Effort)}
    changes = {name: value for name, value in given.items() if value is not None}
    tables = args.tables or tuple(TABLES)
    outcome = run(
        Reproduction(
            args.data,
            args.out,
            tables,
            args.splits,
            changes,
            args.seed,
            args.threads,
            progress=shows_progress(),
            device=args.device,
        )
    )
    print(f"{outcome.report}: {plural(outcome.ran + outcome.before, 'experiment')}, {outcome.ran:,} of them run now")
    if outcome.failed:
        print(f"{plural(outcome.failed, 'experiment')} failed; the same command tries them again")
    return 3 if outcome.failed else 0
