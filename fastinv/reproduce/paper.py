"""What the paper's tables hold: which attacks, at which split points, and what they gave there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fastinv.experiment.cells import Attack, Cell

SPLITS = {"lenet5": ("conv1", "ReLU2"), "cifar_net": ("conv11", "ReLU22", "ReLU32")}  # of the tables, by target
LAYERS = {  # of Figures 11 and 12
    "lenet5": ("conv1", "ReLU1", "pool1", "conv2", "ReLU2", "pool2", "fc1", "fc1act", "fc2", "fc2act"),
}
SHALLOW = ("conv1", "conv11")  # where rMLE takes the fewer steps
DATA = {"lenet5": "MNIST", "cifar_net": "CIFAR-10"}  # of the paper


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it is about.
        attacks: its rows.
        layers: whether its columns are all layers of the target, `LAYERS`, instead of `SPLITS`.
    """

    title: str
    attacks: tuple[Attack, ...]
    layers: bool = False

    def splits(self, target: str) -> tuple[str, ...]:
        """The split points that it has for a target."""
        return (LAYERS if self.layers else SPLITS).get(target, ())


def _figures(*psnr_and_ssim: tuple[float, float]) -> dict[str, tuple[float, float]]:
    return dict(zip((at for splits in SPLITS.values() for at in splits), psnr_and_ssim, strict=True))


_WHITE_BOX = Attack(
    "rMLE",
    "rmle",
    published=_figures((39.69, 0.9969), (15.10, 0.5998), (37.59, 0.9960), (19.47, 0.6940), (13.38, 0.1625)),
)
_INVERSE_NETWORKS = (
    Attack(
        "inverse network, the target's training set",
        "inverse_network",
        "same",
        published=_figures((39.64, 0.9887), (20.35, 0.7334), (49.88, 0.9993), (19.81, 0.6939), (15.42, 0.3124)),
    ),
    Attack(
        "inverse network, another set of the same distribution",
        "inverse_network",
        "distribution",
        published=_figures((40.72, 0.9950), (20.81, 0.8046), (49.02, 0.9992), (19.36, 0.6802), (13.95, 0.2196)),
    ),
    Attack(
        "inverse network, noise",
        "inverse_network",
        "noise",
        published=_figures((14.76, 0.7188), (7.72, 0.4310), (48.59, 0.9996), (12.79, 0.2930), (12.37, 0.0440)),
    ),
)
_SHADOWS = (
    Attack(
        "shadow, same set, same structure",
        "shadow",
        "same",
        "same",
        _figures((17.60, 0.7423), (9.61, 0.4981), (21.16, 0.9104), (12.74, 0.1752), (11.09, 0.0419)),
    ),
    Attack(
        "shadow, different set, same structure",
        "shadow",
        "distribution",
        "same",
        _figures((21.53, 0.9121), (9.27, 0.4652), (21.45, 0.9145), (11.51, 0.1723), (11.98, 0.0102)),
    ),
    Attack(
        "shadow, same set, different structure",
        "shadow",
        "same",
        "different",
        _figures((12.59, 0.6430), (8.05, 0.3790), (17.55, 0.6344), (12.46, 0.2714), (10.68, 0.0247)),
    ),
    Attack(
        "shadow, different set, different structure",
        "shadow",
        "distribution",
        "different",
        _figures((17.86, 0.6952), (8.03, 0.3226), (13.06, 0.1553), (11.30, 0.0467), (11.47, 0.0793)),
    ),
)
_FITTED = Attack(
    "shadow fitted to queries, rMLE",
    "fit_shadow",
    "same",
    "same",
    _figures((39.67, 0.9968), (15.41, 0.6103), (28.67, 0.9766), (18.02, 0.6893), (12.61, 0.1145)),
)

TABLES = {
    "3": Table("Table 3: white-box", (_WHITE_BOX,)),
    "4": Table("Table 4: black-box", _INVERSE_NETWORKS),
    "6": Table("Table 6: query-free", _SHADOWS),
    "8": Table("Table 8: black-box, an inverse network or a reconstructed model", (_INVERSE_NETWORKS[0], _FITTED)),
    "layers": Table("Figures 11 and 12: query-free, layer by layer", (_SHADOWS[0],), layers=True),
}


def cells(target: str, tables: Iterable[str] = TABLES, splits: Iterable[str] | None = None) -> list[Cell]:
    """The experiments that fill these tables for a target, each once, of all their split points or of some."""
    wanted = None if splits is None else set(splits)
    found = (
        Cell(split, attack)
        for table in map(TABLES.__getitem__, tables)
        for split in table.splits(target)
        for attack in table.attacks
        if wanted is None or split in wanted
    )
    return list(dict.fromkeys(found))
