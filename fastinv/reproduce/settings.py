"""How long to train and to optimise, and how many images to score: what decides a run's figures."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fastinv.errors import DataError
from fastinv.experiment import results
from fastinv.experiment.recipe import STEPS
from fastinv.schedule import PRECISIONS
from fastinv.tensors import is_whole

if TYPE_CHECKING:
    from fastinv.experiment.target import Experiment

OPTIMIZERS = tuple(STEPS)


@dataclass(frozen=True)
class Effort:
    """How much work goes into a run.

    Args:
        target_epochs, inverse_network_epochs, shadow_epochs: passes over the images.
        images: how many an attacker has, at most; None: half of the training set.
        scored: test images that are recovered.
        optimizer: of rMLE: "adam", the paper's, or "lbfgs", which gets as far in a fraction of the time.
        precision: of all training, as of `fastinv.schedule.Schedule`.

    Raises:
        DataError: no such numbers.
    """

    target_epochs: int
    inverse_network_epochs: int
    shadow_epochs: int
    images: int | None = None
    scored: int = 1000
    optimizer: str = "adam"
    precision: str = "float32"

    def __post_init__(self) -> None:
        for name, known in (("optimizer", OPTIMIZERS), ("precision", PRECISIONS)):
            value = getattr(self, name)
            if value not in known:
                raise DataError(f"{name} {value!r:.40}, expected one of {', '.join(known)}")
        for name in ("target_epochs", "inverse_network_epochs", "shadow_epochs", "images", "scored"):
            value = getattr(self, name)
            least = 0 if name.endswith("epochs") else 1
            if name == "images" and value is None:
                continue
            if not (is_whole(value) and value >= least):
                raise DataError(f"{name} {value!r:.40}, expected a whole number of at least {least}")
            object.__setattr__(self, name, int(value))  # JSON cannot hold numpy's


EFFORTS = {"lenet5": Effort(10, 20, 10), "cifar_net": Effort(10, 10, 5)}  # by target


def identity(experiment: Experiment, effort: Effort) -> dict[str, Any]:
    """What has to agree for two results to be of one run, as JSON values."""
    parts = (experiment.train, experiment.test)
    return {
        "target": experiment.model.name,
        "data": experiment.train.name,
        "sha256": results.sha256(array for part in parts for array in (part.images, part.labels)),
        "seed": experiment.seed,
        **asdict(effort),
    }
