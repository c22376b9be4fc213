"""What an experiment is: an attack at a split point."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import quote

LONGEST = 100  # letters of a layer's name in a file's: most file systems take 255 in all


@dataclass(frozen=True)
class Attack:
    """What an attacker does, with what: a row of a table.

    Attributes:
        title: what the row is called.
        kind: as of `fastinv train --attack`.
        knowledge: the attacker's images, as of `fastinv.knowledge`; None for an attack that learns nothing.
        architecture: of a shadow: "same" or "different".
        published: the paper's mean PSNR (dB) and SSIM, by split point.
    """

    title: str
    kind: str
    knowledge: str | None = None
    architecture: str | None = None
    published: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """`shadow-same-different`."""
        return "-".join(filter(None, (self.kind, self.knowledge, self.architecture)))

    @property
    def provenance(self) -> dict[str, str]:
        """What an inverter's file says of it."""
        known = {"attack": self.kind, "knowledge": self.knowledge, "architecture": self.architecture}
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True)
class Cell:
    """One experiment: an attack at a split point. Tables may share it."""

    split: str
    attack: Attack

    @property
    def name(self) -> str:
        """`ReLU22-inverse_network-same`: of its files."""
        return f"{file_name(self.split)}-{self.attack.name}"


def file_name(layer: str) -> str:
    """A name for files about a layer: modules may have any names, of any length."""
    quoted = quote(layer, safe="")
    if len(quoted) <= LONGEST:
        return quoted
    return f"{quoted[:LONGEST]}~{hashlib.sha256(layer.encode()).hexdigest()[:16]}"
