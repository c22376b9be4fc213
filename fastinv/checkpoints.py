"""Files of tensors: what training keeps after every epoch, to go on from where it was cut off."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastinv.errors import TrainingError
from fastinv.places import new_file, try_beside

NAMES = {"network": "another network", "data": "other data"}  # of what is kept as a digest


def identity(module: nn.Module, options: Mapping[str, Any], data: Sequence[torch.Tensor]) -> dict[str, Any]:
    """What must agree for a checkpoint to be of this run: the options, and digests of the network and the data."""
    shapes = {name: list(value.shape) for name, value in module.state_dict().items()}
    network = hashlib.sha256(json.dumps(shapes, sort_keys=True).encode())
    content = hashlib.sha256()
    for tensor in data:
        content.update(str(tuple(tensor.shape)).encode())
        content.update(tensor.detach().cpu().contiguous().numpy().data)
    return {"network": network.hexdigest(), "data": content.hexdigest(), **options}


class Checkpoint:
    """A file that holds a network and its optimizer after an epoch of a run.

    Raises:
        TrainingError: `path` is none.
    """

    def __init__(self, path: str | Path, identity: Mapping[str, Any]) -> None:
        if not isinstance(path, (str, os.PathLike)):
            raise TrainingError(f"checkpoint: a {type(path).__name__}, expected the path of a file")
        self._path = Path(path)
        self._identity = dict(identity)

    def expect_place(self) -> None:
        """Raise TrainingError where the file cannot be written."""
        try:
            try_beside(self._path)
        except OSError as error:
            raise TrainingError(f"{self._path}: cannot be written ({error.strerror}); choose another place") from error

    def save(self, epoch: int, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Keep how things stand after so many epochs."""
        state = {"identity": self._identity, "epoch": epoch, "module": module.state_dict()}
        save_tensors({**state, "optimizer": optimizer.state_dict()}, self._path)

    def resume(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
        """Bring both to where the run was cut off; the epoch to go on with, 0 where there is no file yet.

        Raises:
            TrainingError: the file is damaged, or of another run; the message names what differs.
        """
        if not self._path.exists():
            return 0
        state = load_tensors(self._path)
        keys = {"identity", "epoch", "module", "optimizer"}
        if not isinstance(state, dict) or set(state) != keys or not isinstance(state["identity"], dict):
            raise TrainingError(f"{self._path}: no checkpoint of this version; delete it or name another file")
        found = state["identity"]
        differing = [
            NAMES.get(name, f"{name} {found.get(name)!r:.40}, not {wanted!r}")
            for name, wanted in self._identity.items()
            if found.get(name) != wanted
        ]
        if differing:
            hint = ""
            if found.get("epochs") != self._identity.get("epochs"):
                hint = (
                    ". The step size falls over all epochs, so that the first of more are not the same: to train a "
                    "finished network on, pass it as the one to train"
                )
            raise TrainingError(
                f"{self._path}: the checkpoint of another run ({', '.join(differing)}); delete it or name another "
                f"file{hint}"
            )
        module.load_state_dict(state["module"])
        optimizer.load_state_dict(state["optimizer"])
        return int(state["epoch"])


def save_tensors(state: Mapping[str, Any], path: str | Path) -> None:
    """`torch.save`, whole or not at all: a file already there survives a failed write.

    Raises:
        TrainingError: the place cannot be written to.
    """
    try:
        with new_file(path) as file:
            torch.save(dict(state), file)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def load_tensors(path: str | Path) -> Any:
    """What `save_tensors` wrote; code in the file is never run.

    Raises:
        TrainingError: the file is missing or damaged.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():  # of a path, torch would go by the suffix
            warnings.simplefilter("ignore")  # of what it refuses it warns, too
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise TrainingError(f"{path}: cannot be read ({error.strerror or error}); name another file") from None
    except Exception as error:  # it has no common base; of more than tensors it says how to run what is in the file
        raise TrainingError(
            f"{path}: cannot be read: cut off, or no file of tensors, as training writes them; delete it or name "
            "another file"
        ) from error
