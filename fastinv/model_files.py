"""A model of the user's, from where its code is and, if not in it, from a file of weights."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from fastinv.checkpoints import load_tensors
from fastinv.errors import FormatError, NetworkError

NESTED = ("state_dict", "model_state_dict", "model", "weights")  # where training scripts put them among other things
PREFIXES = ("_orig_mod.", "module.", "_orig_mod.")  # of names in a model that torch.compile or DataParallel holds


def load_model(place: str, weights: str | Path | None = None) -> tuple[nn.Module, Callable[[], nn.Module] | None]:
    """A model in eval mode; and what makes an untrained one, where that can be told.

    Args:
        place: "FILE.py:NAME" or "PACKAGE.MODULE:NAME"; NAME is an `nn.Module`, or a callable without arguments that
            makes one. The code there is run.
        weights: a file of them, `.safetensors` or what `torch.save` wrote of a state dict; no code in it is run. They
            have to fit the model wholly. With them, what NAME makes counts as untrained.

    Raises:
        NetworkError: there is no such code, it fails, or gives no model.
        FormatError, TrainingError: the weights cannot be read, or do not fit.
    """
    found = _named(place)
    make = None if isinstance(found, nn.Module) else found
    model = found if make is None else _made(place, make)
    if weights is None:
        return model.eval(), None
    _load_weights(model, Path(weights))
    return model.eval(), None if make is None else lambda: _made(place, make)


def load_function(place: str) -> Callable[[Any], Any]:
    """A function, or anything that can be called, named as of `load_model`.

    Raises:
        NetworkError: there is no such code, it fails, or gives nothing to call.
    """
    found = _named(place)
    if not callable(found):
        raise NetworkError(f"{place}: a {type(found).__name__}, expected a function")
    function: Callable[[Any], Any] = found
    return function


def _named(place: str) -> Any:
    """What "FILE.py:NAME" or "PACKAGE.MODULE:NAME" names."""
    path, colon, name = place.rpartition(":")
    if not (colon and path and name):
        raise NetworkError(f"{place}: expected FILE.py:NAME or PACKAGE.MODULE:NAME, NAME what is there")
    found: Any = _imported(path)
    for part in name.split("."):
        if not hasattr(found, part):
            names = ", ".join(known for known in vars(found) if known[0] != "_") or "none"
            raise NetworkError(f"{path}: has no {part!r:.60}; it has {names:.200}")
        found = getattr(found, part)
    return found


def _imported(path: str) -> ModuleType:
    """The module in a file, or of a name. Files beside the first are found by its imports, as by a script's."""
    file = Path(path).resolve() if path.endswith(".py") else None
    folder = "" if file is None else str(file.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # stays: functions import, too
    try:
        if file is None:
            return importlib.import_module(path)
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module  # where dataclasses look for it
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # of the user's code, any
        raise NetworkError(f"{path}: cannot be imported ({type(error).__name__}: {error!s:.200})") from error


def _made(place: str, make: Any) -> nn.Module:
    try:
        model = make()
    except Exception as error:  # likewise
        raise NetworkError(
            f"{place}: fails, called without arguments ({type(error).__name__}: {error!s:.200}); write a function that "
            "needs none"
        ) from error
    if not isinstance(model, nn.Module):
        raise NetworkError(f"{place}: gives a {type(model).__name__}, expected a torch.nn.Module")
    return model


def _load_weights(model: nn.Module, file: Path) -> None:
    state = _state_of(file)
    for prefix in PREFIXES:
        if state.keys() != model.state_dict().keys():
            consume_prefix_in_state_dict_if_present(state, prefix)
    try:
        model.load_state_dict(state)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise FormatError(f"{file}: not the weights of this model ({' '.join(str(error).split()):.300})") from None


def _state_of(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise FormatError(f"{file}: cannot be read ({error!s:.200})") from None
    state = load_tensors(file)
    for name in NESTED:
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    if not (isinstance(state, dict) and all(isinstance(name, str) for name in state)):
        raise FormatError(f"{file}: holds a {type(state).__name__}, expected a state dict, of tensors by name")
    return dict(state)
